"""The policies that need no prompts, and the controls: what the grid applies to every adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from csulora.tuning.controls import random_subspaces
from safetensors.torch import load_file

import csulora
from csulora import Policy
from csulora.tuning.update import Factors, factors_of

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


def truncated(subspace: csulora.Subspace, rank: int) -> csulora.Subspace:
    """The subspace file with its leading `rank` directions per module."""
    return csulora.Subspace(
        {
            name: replace(
                module,
                u=module.u[:, :rank].contiguous(),
                s=module.s[:rank].contiguous(),
                v=module.v[:, :rank].contiguous(),
            )
            for name, module in subspace.items()
        },
        subspace.provenance,
    )


def other_layers(subspace: csulora.Subspace) -> csulora.Subspace:
    """The subspace file with every kind of module's subspaces moved on by one layer."""
    kinds: dict[str, list[str]] = {}
    for name in subspace:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    moved = {name: subspace[names[(at + 1) % len(names)]] for names in kinds.values() for at, name in enumerate(names)}
    return csulora.Subspace(moved, subspace.provenance)


def apply(family: str, name: str, adapter: csulora.Adapter, subspace: csulora.Subspace, policy: Policy) -> Corrected:
    """What `csulora correct` would write."""
    fixed, report = csulora.correct(adapter, subspace, policy)
    return Corrected(family, name, False, factors_of(fixed), report.to_dict()["totals"]["relative_change"])


def scaled(adapter: csulora.Adapter, factor: float, family: str = "scaling") -> Corrected:
    """Control: the whole update times `factor`."""
    factors = {name: (factor * b, a) for name, (b, a) in factors_of(adapter).items()}
    return Corrected(family, f"x{factor:.2g}", True, factors, 1 - factor)


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


def whole_grid(adapter: csulora.Adapter, subspace: csulora.Subspace, lab: Path) -> Iterator[Corrected]:
    """Every policy and every control that needs no prompts; `subspace file` has at least the largest of `RANKS`."""
    yield apply("none", "uncorrected", adapter, truncated(subspace, 1), Policy.none())
    for factor in SCALES:
        yield scaled(adapter, factor)
    for rank in RANKS:
        known = truncated(subspace, rank)
        for family, name, policy in presets(rank):
            yield apply(family, name, adapter, known, policy)
        others = {"random subspace": random_subspaces(known, seed=rank), "other layer": other_layers(known)}
        for kind, control in others.items():
            for family, policy in (("csulora", Policy.csulora(10.0)), ("protect", Policy.protect(math.inf))):
                done = apply(kind, f"{family} k={rank}", adapter, control, policy)
                yield replace(done, control=True)
    yield from safe_lora(adapter, lab)


def short_grid(adapter: csulora.Adapter, subspace: csulora.Subspace, lab: Path) -> Iterator[Corrected]:
    """One or two policies of every family and every control, k = 8."""
    yield from data_free(adapter, truncated(subspace, 8))
    yield from safe_lora(adapter, lab)


def data_free(adapter: csulora.Adapter, subspace: csulora.Subspace) -> Iterator[Corrected]:
    """One or two policies of every family, and the controls that need no dense matrix."""
    rank = max(module.rank for module in subspace.values())
    yield apply("none", "uncorrected", adapter, subspace, Policy.none())
    for factor in (0.3, 0.5, 0.7):
        yield scaled(adapter, factor)
    yield apply("csulora", f"l=1 k={rank}", adapter, subspace, Policy.csulora(1.0))
    yield apply("project", f"k={rank}", adapter, subspace, Policy.project())
    yield apply("protect", f"l=1 k={rank}", adapter, subspace, Policy.protect(1.0))
    yield apply("protect", f"l=inf k={rank}", adapter, subspace, Policy.protect(math.inf))
    yield apply("aligned-only", f"l=inf k={rank}", adapter, subspace, Policy(math.inf, 0.0, 0.0))
    for kind, control in (
        ("random subspace", random_subspaces(subspace, seed=rank)),
        ("other layer", other_layers(subspace)),
    ):
        yield replace(apply(kind, f"protect k={rank}", adapter, control, Policy.protect(math.inf)), control=True)


def safe_lora(adapter: csulora.Adapter, lab: Path) -> Iterator[Corrected]:
    """Safe LoRA from its formula: B <- C B with C = D D^T / |D|_F, in all modules and in the least similar half."""
    base, aligned = (load_file(lab / side / "model.safetensors") for side in ("base", "aligned"))
    factors, projected, similar = factors_of(adapter), {}, {}
    for name, (b, a) in factors.items():
        displacement = aligned[f"{name}.weight"].float() - base[f"{name}.weight"].float()
        projected[name] = displacement @ (displacement.T @ b) / displacement.norm(), a
        update, after = b @ a, projected[name][0] @ a
        similar[name] = float((update * after).sum() / (update.norm() * after.norm()))
    threshold = sorted(similar.values())[len(similar) // 2]
    for label, chosen in (("all", projected), ("half", {n: projected[n] for n in factors if similar[n] < threshold})):
        after = {**factors, **chosen}
        distance2 = sum(float((after[n][0] @ after[n][1] - b @ a).square().sum()) for n, (b, a) in factors.items())
        norm2 = sum(float(torch.linalg.matrix_norm(b @ a) ** 2) for b, a in factors.values())
        yield Corrected("safe-lora", label, True, after, math.sqrt(distance2 / norm2))
