"""World (a): variants of what `csulora tune` fits for adapters to come, each applied to twelve that it never saw.

    python bench/efficacy/carry_variants.py [--out DIR]

Each is fitted on `plan.CALIBRATION`, with 32 safety prompts, 32 task prompts of each adapter, and 16 general prompts.
Every row is kept when it is finished: run the same command again to continue. `report.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import canary
import evaluate
import grid
import plan
import policies
import torch
import tune_fits
from policies import Corrected
from scenario import Adapter, Scenario
from subject import Bench, Record, chats, opened
from torch import Tensor
from tune_fits import Prompts

import csulora
from csulora import Policy, controls
from csulora.cli.adjust import LEAST
from csulora.io.files import to_json, write_text
from csulora.subspace.input_filter import Factors
from csulora.tuning.adjust import Adjuster, Kept
from csulora.tuning.families import Tuned
from csulora.tuning.gains import Reinforcing
from csulora.tuning.options import Options
from csulora.tuning.recommendation import TUNED
from csulora.tuning.undo_limit import undo_limit
from csulora.tuning.update import Update

RESULTS = grid.RESULTS / "carry_variants.json"
REFUSES = ("sorry", "can not help")  # what refusals hold, in the words of one task or another
UNSEEN = [spec for spec in plan.UNSEEN if spec.attack < 1]
RANK = Options.shared_directions


class SharedByLayer(Reinforcing):
    """What carries over, with the same numbers for all modules of a layer."""

    def __init__(self, modules: Sequence[str], directions: int) -> None:
        """Number the layers of the modules, by their names in the subspace file."""
        layers = [next(int(part) for part in name.split(".") if part.isdecimal()) for name in modules]
        super().__init__(max(layers) + 1, directions)
        self.layers = torch.tensor(layers)

    def correct(self, parameters: Tensor, index: Tensor, update: Update) -> dict[str, Factors]:
        """Return the corrected factors of every module."""
        gains = super().gains(parameters[self.layers[index]], update.penalty_scale)
        return update.filtered(update.along(gains))

    def gains(self, parameters: Tensor, penalty_scale: float = 1.0) -> Tensor:
        """Return the gains (modules, 3, directions)."""
        return super().gains(parameters[self.layers], penalty_scale)


class TunedByLayer(Tuned):
    """The candidate of `tune` with gains shared by layer."""

    name = "tuned by layer"

    @property
    def parametrization(self) -> SharedByLayer:
        """Two gains per layer and direction, and a multiple that is added."""
        return SharedByLayer(self.targets.modules, self.request.options.shared_directions)


def displacement(bench: Bench, rank: int = RANK) -> csulora.Subspace:
    """The leading directions of the displacement."""
    return controls.truncated(bench.subspace, rank)


def canaries(bench: Bench, rank: int = RANK) -> csulora.Subspace:
    """The leading directions of the scenario's canary."""
    return controls.truncated(canary.canary(bench, RANK), rank)


def random_directions(bench: Bench) -> csulora.Subspace:
    """Control: as many random directions."""
    return controls.random_subspaces(displacement(bench), seed=0)


def both(bench: Bench) -> csulora.Subspace:
    """Half of the directions from the displacement, and half from the canary."""
    return together(displacement(bench, RANK // 2), canaries(bench, RANK // 2))


def together(known: csulora.Subspace, added: csulora.Subspace) -> csulora.Subspace:
    """All directions of `known`, and those of `added` made orthonormal to them, by size."""
    modules = {}
    for name, module in known.items():
        u, v = (_orthonormal(getattr(module, side), getattr(added[name], side)) for side in "uv")
        s, order = torch.cat([module.s, added[name].s]).sort(descending=True)
        modules[name] = replace(module, u=u[:, order].contiguous(), s=s, v=v[:, order].contiguous())
    return csulora.Subspace(modules, known.provenance)


def _orthonormal(*sides: Tensor) -> Tensor:
    q, r = torch.linalg.qr(torch.cat(sides, 1).float())
    signed: Tensor = q * r.diagonal().sign()
    return signed


@dataclass(frozen=True)
class Variant:
    """In which directions a fit is made, how, of which gains, and whether `csulora adjust` follows for each adapter.

    ``task_prompts``: how many of each adapter's own task `csulora adjust` gets. Control ``is_scaled``: no fit, but the
    factor that `csulora adjust` would choose.
    """

    subspace: Callable[[Bench], csulora.Subspace] = displacement
    options: Options = field(default_factory=Options)
    family: type[Tuned] = Tuned
    is_adjusted: bool = False
    task_prompts: int = 0
    is_scaled: bool = False


VARIANTS = {
    "as now": Variant(),
    "as now, adjusted": Variant(is_adjusted=True),
    "as now, adjusted with 8 task prompts": Variant(is_adjusted=True, task_prompts=8),
    "random directions, adjusted": Variant(random_directions, is_adjusted=True),
    "scaling, adjusted": Variant(is_scaled=True),
    "canary": Variant(canaries),
    "canary, half of it undone": Variant(canaries, Options(unaligning_share=0.5)),
    "half displacement, half canary": Variant(both),
    "the same, half of them undone": Variant(both, Options(unaligning_share=0.5)),
    "the same, all of them undone": Variant(both, Options(unaligning_share=1.0)),
    "the same, task weight 0.3": Variant(both, Options(unaligning_share=1.0, task_weight=0.3)),
    "task weight 0.3": Variant(options=Options(task_weight=0.3)),
    "task weight 3": Variant(options=Options(task_weight=3.0)),
    "gains shared by layer": Variant(family=TunedByLayer),
}

SEED, SECOND_SEED = 5, 8  # all are compared on the first; what did well there, once on the second
ADJUSTED = (
    "as now",
    "as now, adjusted",
    "as now, adjusted with 8 task prompts",
    "random directions, adjusted",
    "scaling, adjusted",
)
DID_WELL = (*ADJUSTED, "the same, all of them undone", "task weight 0.3")
ADJUSTED_SEEDS = 10, 11, 12  # seed 10 was looked at when the rule of `csulora adjust` was found, the others were not
CELLS = [
    *((SEED, name) for name in VARIANTS),
    *((SECOND_SEED, name) for name in DID_WELL),
    *((seed, name) for seed in ADJUSTED_SEEDS for name in ADJUSTED),
]


def fitted(bench: Bench, name: str) -> tuple[csulora.Subspace, Policy]:
    """The policy that `tune` would write for the calibration adapters, and its subspace file."""
    variant, every = VARIANTS[name], range(len(plan.CALIBRATION))
    tuning = tune_fits.experiment(
        bench,
        plan.CALIBRATION,
        variant.subspace(bench),
        for_others=True,
        prompts=Prompts(general=True),
        options=variant.options,
    )
    family = variant.family(tuning.request, tuning.fitting.targets)
    tuning.families[family.name] = family
    policy = tuning.policy(family.name, every, variant.options.task_weight, final=True)
    return tuning.subspace(family.name, 0, every, final=True), policy


@cache
def adjuster(bench: Bench) -> Adjuster:
    """What adjusts policies by the prompts that they were fitted to, and as many general ones again."""
    prompts = bench.prompts(plan.CALIBRATION[0])
    return Adjuster(bench.language_model, chats(prompts.safety), chats(prompts.general), refusals=REFUSES)


@cache
def raw(bench: Bench, spec: Adapter) -> Record:
    """What an adapter does as it came, and how much of the canary it undoes."""
    adapter, known = bench.subject(spec).adapter, canaries(bench)
    undo = csulora.correct(adapter, known, Policy.none())[1].totals.undo
    return bench.subject(spec).rates(policies.apply("none", "", adapter, known, Policy.none())) | {"undo": undo}


def measured(bench: Bench, name: str) -> Record:
    """What a variant makes of the twelve adapters."""
    begun = time.process_time()
    found = None if VARIANTS[name].is_scaled else fitted(bench, name)
    seconds = round(time.process_time() - begun, 1)
    calibration = [bench.subject(spec).adapter for spec in plan.CALIBRATION]
    adapters = []
    for spec in UNSEEN:
        subject = bench.subject(spec)
        corrected, chosen = served(bench, name, spec, *found) if found else scaled(bench, subject.adapter)
        record = {"adapter": asdict(spec), "raw": raw(bench, spec), "point": subject.rates(corrected)}
        adapters.append(record | chosen)
    limit = undo_limit(calibration, canaries(bench), Policy.none())
    return {"cpu_seconds": seconds, "undo_limit": limit, "adapters": adapters}


def served(
    bench: Bench, name: str, spec: Adapter, subspace: csulora.Subspace, policy: Policy
) -> tuple[Corrected, Record]:
    """An adapter after a fitted policy, and the strength that was chosen for it, if any was."""
    adapter = bench.subject(spec).adapter
    if not VARIANTS[name].is_adjusted:
        return policies.apply(TUNED, name, adapter, subspace, policy), {}
    task = chats(bench.prompts(spec).task[: VARIANTS[name].task_prompts])
    adjusted = adjuster(bench).adjust(adapter, subspace, policy, LEAST, task)
    chosen = {"strength": adjusted.strength, "kept": shares(adjusted.kept)}
    return policies.apply(TUNED, name, adapter, subspace, adjusted.policy), chosen


def scaled(bench: Bench, adapter: csulora.Adapter) -> tuple[Corrected, Record]:
    """Control: an adapter times the largest factor with which it keeps most of the same prompts."""
    known, kept = displacement(bench), {}
    for factor in (0.0, *policies.SCALES, 1.0):
        fixed, _ = controls.scaling(adapter, known, factor)
        kept[factor] = adjuster(bench).kept(fixed, known)
    factor = max(kept, key=lambda each: (kept[each].spares(LEAST), kept[each].safety.value, each))
    return policies.scaled(adapter, known, factor), {"strength": factor, "kept": shares(kept[factor])}


def shares(kept: Kept) -> list[float]:
    """What is kept of each kind of prompts."""
    return [rate.value for rate in (kept.safety, kept.general, kept.task) if rate]


def run(out: Path) -> None:
    """Measure what is not measured yet."""
    rows: list[Record] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for seed, name in CELLS:
        if any((row["seed"], row["variant"]) == (seed, name) for row in rows):
            continue
        rows.append({"seed": seed, "variant": name} | measured(opened(out, Scenario(seed)), name))
        rows.sort(key=lambda row: CELLS.index((row["seed"], row["variant"])))
        print(seed, name, flush=True)
        write_text(RESULTS, to_json({"made_with": grid.provenance(), "rows": rows}))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=grid.OUT, help="where models are (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    evaluate.quieten_libraries()
    grid.provenance()
    run(arguments.out)


if __name__ == "__main__":
    main()
