"""World (a): what carries over better than what `csulora tune` fits for adapters to come, and what does not.

    python bench/efficacy/carry_variants.py [--out DIR] [--seeds 5 7] [--variants NAME ...] [--unseen 12]

Each variant is calibrated on three adapters with 32 safety, 3 x 32 task and 16 general prompts, and applied to up to
twelve others. What is finished is kept: run the same command again to continue. The table is printed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

import canary
import evaluate
import grid
import measure
import plan
import policies
import torch
from scenario import Adapter, Scenario
from subject import Bench, Record, Subject, chats, opened
from torch import Tensor

import csulora
from csulora import controls
from csulora.io.files import to_json, write_text
from csulora.subspace.input_filter import Factors
from csulora.tuning.experiment import Experiment
from csulora.tuning.families import Tuned
from csulora.tuning.gains import Reinforcing
from csulora.tuning.measurement import Use
from csulora.tuning.options import Options
from csulora.tuning.recommendation import TUNED
from csulora.tuning.request import Request
from csulora.tuning.splits import HELD_OUT
from csulora.tuning.update import Update, factors_of

RESULTS = grid.RESULTS / "carry_variants.json"
# The most telling first: of `tale` with 20 % attacks most is left, and harmless tasks suffer as others do.
_TELLING = [Adapter("tale", 0.2, 16, 6), plan.HARMLESS]
UNSEEN = [*_TELLING, *(spec for spec in plan.UNSEEN if spec.attack < 1 and spec not in _TELLING)]
EVERY = range(len(plan.CALIBRATION))
RANK = Options.shared_directions
WEIGHTS = (0.3, 1.0, 3.0)


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

    @property
    def parametrization(self) -> SharedByLayer:
        """Two gains per layer and direction, and a multiple that is added."""
        return SharedByLayer(self.targets.modules, self.request.options.shared_directions)


def displacement(bench: Bench) -> csulora.Subspace:
    """The leading directions of the displacement."""
    return controls.truncated(bench.subspace, RANK)


def canaries(bench: Bench) -> csulora.Subspace:
    """The directions of the scenario's canary."""
    return controls.truncated(canary.canary(bench, RANK), RANK)


def both(bench: Bench) -> csulora.Subspace:
    """The leading directions of the displacement plus the canary's, which are made as large together."""
    known, added = bench.subspace, canary.canary(bench, RANK)
    norms = [sum(float(module.s.square().sum()) for module in each.values()) ** 0.5 for each in (known, added)]
    modules = {}
    for name, module in known.items():
        other = added[name]
        left, right = torch.cat([module.u, other.u], 1).float(), torch.cat([module.v, other.v], 1).float()
        values = torch.cat([module.s, other.s * (norms[0] / norms[1])])
        u, s, vt = torch.linalg.svd((left * values) @ right.T, full_matrices=False)
        modules[name] = replace(module, u=u[:, :RANK].contiguous(), s=s[:RANK], v=vt[:RANK].T.contiguous())
    return csulora.Subspace(modules, known.provenance)


@dataclass(frozen=True)
class Variant:
    """In which directions a fit is made, with which weights of the task prompts, and with which gains."""

    subspace: Callable[[Bench], csulora.Subspace] = displacement
    weights: tuple[float, ...] = (1.0,)
    family: type[Tuned] = Tuned


VARIANTS = {
    "as now": Variant(),
    "in the canary": Variant(canaries),
    "gains shared by layer": Variant(family=TunedByLayer),
    "in the displacement plus the canary": Variant(both),
    "weight chosen by the worst left-out adapter": Variant(weights=WEIGHTS),
}


def experiment(bench: Bench, name: str) -> Experiment:
    """What `tune` does on the calibration adapters, and has finished of it."""
    variant, given = VARIANTS[name], [bench.prompts(spec) for spec in plan.CALIBRATION]
    request = Request(
        str(bench.lab.aligned()),
        [bench.subject(spec).adapter for spec in plan.CALIBRATION],
        variant.subspace(bench),
        task=[chats(each.task) for each in given],
        safety=chats(given[0].safety),
        general=chats(given[0].general[: canary.GENERAL]),
        longest_reply=measure.MAX_REPLY,
        task_weights=variant.weights,
    )
    output = bench.lab.directory / f"carry-{name.replace(' ', '-')}.toml"
    tuning = Experiment(request, output, language_model=bench.language_model)
    kept = tuning.families[TUNED]
    tuning.families[TUNED] = variant.family(request, kept.targets)
    return tuning


def worst_left_out(tuning: Experiment, weight: float) -> tuple[float, float]:
    """The least share of a kind of prompt that an adapter keeps which is left out of the fit, and their mean."""
    shares = []
    for number in EVERY:
        others = [other for other in EVERY if other != number]
        policy = tuning.policy(TUNED, others, weight)
        found = tuning.measurement.measure(Use(number, tuning.subspace(TUNED, number, others), policy))
        parts = [tuning.examples.part(number, split) for split in HELD_OUT]
        for at, kind in enumerate(("safety", "task", "general")):
            shares.append(sum(found[split][kind] for split in HELD_OUT) / sum(len(part.kinds[at]) for part in parts))
    return min(shares), fmean(shares)


def rates(subject: Subject, adapter: csulora.Adapter) -> Record:
    """What an adapter does."""
    with subject.bench.language_model.adapted(factors_of(adapter)):
        found = subject.examiner.measure(subject.bench.language_model.model)
    return {"attack": found.attack, "task": found.task, "elsewhere": found.benign}


def measured(bench: Bench, name: str, specs: Sequence[Adapter]) -> Record:
    """What a variant makes of adapters that it has not seen."""
    begun = time.process_time()
    tuning = experiment(bench, name)
    weights = tuning.request.weights
    left_out = {weight: worst_left_out(tuning, weight) for weight in weights} if len(weights) > 1 else {}
    weight = max(left_out, key=lambda each: left_out[each]) if left_out else weights[0]
    policy = tuning.policy(TUNED, EVERY, weight, final=True)
    subspace = tuning.subspace(TUNED, 0, EVERY, final=True)
    seconds = round(time.process_time() - begun, 1)
    adapters = []
    for spec in specs:
        subject = bench.subject(spec)
        fixed = policies.apply(TUNED, name, subject.adapter, subspace, policy)
        with bench.language_model.adapted(fixed.factors):
            found = subject.examiner.measure(bench.language_model.model)
        point = {"attack": found.attack, "task": found.task, "elsewhere": found.benign}
        adapters.append({"adapter": asdict(spec), "raw": rates(subject, subject.adapter), "point": point})
    return {"weight": weight, "left_out": left_out, "cpu_seconds": seconds, "adapters": adapters}


def kept(row: Record, kind: str) -> list[float]:
    """What is left of the attack, or kept of the task and of all else, by adapter."""
    if kind == "attack":
        return [each["point"][kind] for each in row["adapters"]]
    return [each["point"][kind] / each["raw"][kind] for each in row["adapters"]]


def table(rows: Sequence[Record]) -> str:
    """Return the table of median and worst over the adapters."""
    lines = ["| seed | variant | attack | task | elsewhere |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row["seed"]):
        figures = []
        for kind, worst in (("attack", max), ("task", min), ("elsewhere", min)):
            shares = kept(row, kind)
            figures.append(f"{median(shares):.2f} / {worst(shares):.2f}")
        lines.append(f"| {row['seed']} | {row['variant']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def run(out: Path, seeds: Sequence[int], names: Sequence[str], unseen: int) -> None:
    """Measure what is not measured yet, and print the table."""
    rows: list[Record] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for seed, name in itertools.product(seeds, names):
        if any((row["seed"], row["variant"]) == (seed, name) for row in rows):
            continue
        rows.append({"seed": seed, "variant": name} | measured(opened(out, Scenario(seed)), name, UNSEEN[:unseen]))
        print(table(rows[-1:]).rpartition("\n")[2], flush=True)
        write_text(RESULTS, to_json({"made_with": grid.provenance(), "rows": rows}))
    print(table(rows))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=grid.OUT, help="where models are (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 7])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--unseen", type=int, default=len(UNSEEN), help="on how many others (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    evaluate.quieten_libraries()
    grid.provenance()
    run(arguments.out, arguments.seeds, arguments.variants, arguments.unseen)


if __name__ == "__main__":
    main()
