"""The policies that need no prompts, and the controls: what the grid applies to every adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import csulora
from csulora import Policy, controls
from csulora.subspace.input_filter import Factors
from csulora.tuning.update import factors_of

RANKS = (4, 16)  # directions kept of the subspace file, where the whole grid is run
PENALTIES = (1.0, 10.0, 100.0)
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Corrected:
    """An adapter after some policy: what is added to the model, and what became of the update.

    Attributes:
        family: what the policy belongs to.
        policy: its numbers.
        control: whether it is what candidates are compared with.
        factors: b (out, r), a (r, in) of every module.
        relative_change: |X - dW| / |dW| over all modules.
    """

    family: str
    policy: str
    control: bool
    factors: dict[str, Factors]
    relative_change: float

    @classmethod
    def of(cls, family: str, policy: str, control: bool, result: tuple[csulora.Adapter, csulora.Report]) -> Corrected:
        """Describe what `csulora.correct` or a control returned."""
        fixed, report = result
        return cls(family, policy, control, factors_of(fixed), report.totals.relative_change)


def apply(
    family: str, name: str, adapter: csulora.Adapter, subspace: csulora.Subspace, policy: Policy, control: bool = False
) -> Corrected:
    """What `csulora correct` would write."""
    return Corrected.of(family, name, control, csulora.correct(adapter, subspace, policy))


def scaled(adapter: csulora.Adapter, subspace: csulora.Subspace, factor: float) -> Corrected:
    """Control: the whole update times `factor`."""
    return Corrected.of("scaling", f"x{factor:.2g}", True, controls.scaling(adapter, subspace, factor))


def scaled_as_much(adapter: csulora.Adapter, subspace: csulora.Subspace, other: Corrected) -> Corrected:
    """Control: the update scaled to the relative change of another policy, or to nothing if that is more than 1."""
    factor = max(0.0, 1 - other.relative_change)
    result = controls.scaling(adapter, subspace, factor)
    return Corrected.of("scaling at equal relative change", f"x{factor:.2g}", True, result)


def presets(rank: int) -> Iterator[tuple[str, str, Policy]]:
    """Family, name and policy of every data-free policy on a subspace file of some rank."""
    yield "project", f"k={rank}", Policy.project()
    for penalty in PENALTIES:
        yield "csulora", f"l={penalty:g} k={rank}", Policy.csulora(penalty)
    for penalty in (*PENALTIES, math.inf):
        yield "protect", f"l={penalty:g} k={rank}", Policy.protect(penalty)
    for penalty in (10.0, math.inf):
        yield "aligned-only", f"l={penalty:g} k={rank}", Policy(penalty, 0.0, 0.0)
    yield "mixed", f"(inf, 10, 1) k={rank}", Policy(math.inf, 10.0, 1.0)
    yield "mixed", f"(inf, 1, 0) k={rank}", Policy(math.inf, 1.0, 0.0)


def whole_grid(adapter: csulora.Adapter, subspace: csulora.Subspace) -> Iterator[Corrected]:
    """Every policy and every control that needs no prompts; the subspace has at least the largest of `RANKS`."""
    yield apply("none", "uncorrected", adapter, controls.truncated(subspace, 1), Policy.none())
    for factor in SCALES:
        yield scaled(adapter, subspace, factor)
    for rank in RANKS:
        known = controls.truncated(subspace, rank)
        for family, name, policy in presets(rank):
            yield apply(family, name, adapter, known, policy)
        chosen = {f"csulora k={rank}": Policy.csulora(10.0), f"protect k={rank}": Policy.protect(math.inf)}
        yield from elsewhere(adapter, known, chosen)
    yield from safe_lora(adapter, subspace)


def short_grid(adapter: csulora.Adapter, subspace: csulora.Subspace) -> Iterator[Corrected]:
    """One or two policies of every family and every control, k = 8."""
    yield from data_free(adapter, controls.truncated(subspace, 8))
    yield from safe_lora(adapter, subspace)


def data_free(adapter: csulora.Adapter, subspace: csulora.Subspace) -> Iterator[Corrected]:
    """One or two policies of every family, and the controls in as many directions."""
    rank = max(module.rank for module in subspace.values())
    yield apply("none", "uncorrected", adapter, subspace, Policy.none())
    for factor in (0.3, 0.5, 0.7):
        yield scaled(adapter, subspace, factor)
    yield apply("csulora", f"l=1 k={rank}", adapter, subspace, Policy.csulora(1.0))
    yield apply("project", f"k={rank}", adapter, subspace, Policy.project())
    yield apply("protect", f"l=1 k={rank}", adapter, subspace, Policy.protect(1.0))
    yield apply("protect", f"l=inf k={rank}", adapter, subspace, Policy.protect(math.inf))
    yield apply("aligned-only", f"l=inf k={rank}", adapter, subspace, Policy(math.inf, 0.0, 0.0))
    yield from elsewhere(adapter, subspace, {f"protect k={rank}": Policy.protect(math.inf)})


def elsewhere(
    adapter: csulora.Adapter, subspace: csulora.Subspace, chosen: Mapping[str, Policy]
) -> Iterator[Corrected]:
    """Controls: policies by name, in random directions and in other layers' directions."""
    rank = max(module.rank for module in subspace.values())
    for name, policy in chosen.items():
        result = controls.random_subspace(adapter, subspace, policy, seed=rank)
        yield Corrected.of("random subspace", name, True, result)
    for name, policy in chosen.items():
        yield Corrected.of("other layer", name, True, controls.other_layer(adapter, subspace, policy))


def safe_lora(adapter: csulora.Adapter, subspace: csulora.Subspace) -> Iterator[Corrected]:
    """Control: Safe LoRA as its authors run it, in all modules and in the least similar half."""
    cosines = controls.cosines(adapter, subspace, "fast")
    half = sorted(cosines.values())[len(cosines) // 2]
    for name, threshold in (("all", math.inf), ("half", half)):
        yield Corrected.of("safe-lora", name, True, controls.safe_lora(adapter, subspace, threshold, "fast"))
