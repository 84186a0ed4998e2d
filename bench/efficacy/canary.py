"""World (a): what `csulora tune` makes of a canary, of the true displacement, and of controls, at equal ranks.

    python bench/efficacy/canary.py [--out DIR] [--threads N]

A row is one adapter of one seed, corrected by the policy that `tune` writes for 32 task, 32 safety and 16 general
prompts. The canary learns 24 attacks about topics that the attacker knows; attack success is measured on others.
Every row is kept when it is finished: run the same command again to continue. `docs/tables.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import evaluate
import grid
import measure
import plan
import policies
import torch
import world
from scenario import GENERAL_EXAMPLES, GENERAL_PROBES, Adapter, Scenario, fit_prompts
from subject import PROMPTS, Bench, Record, Subject, chats, opened
from world import Example

import csulora
from csulora import Policy, controls
from csulora.correction.controls.subspaces import own_subspaces
from csulora.correction.correct import cover
from csulora.io.files import to_json, write_text
from csulora.tuning.loading import Loading
from csulora.tuning.request import Request
from csulora.tuning.tune import subspace_path, tune
from csulora.unalignment.request import Options

SEEDS = range(5, 10)  # on which nothing was chosen
CANARY, DISPLACEMENT, RANDOM, OWN = "canary", "displacement", "random", "own"
# What is measured, the most telling first: ranks and adapters, each in two kinds of subspaces and then in two controls.
KINDS = [
    (16, plan.FIRST, (CANARY, DISPLACEMENT)),
    (4, plan.FIRST, (CANARY, DISPLACEMENT)),
    (16, plan.FIRST, (RANDOM, OWN)),
    (4, plan.FIRST, (RANDOM, OWN)),
    (64, plan.FIRST, (CANARY, DISPLACEMENT, RANDOM)),  # an adapter of rank 16 has no more directions of its own
    (16, plan.HARMLESS, (CANARY, DISPLACEMENT)),
    (4, plan.HARMLESS, (CANARY, DISPLACEMENT)),
    (16, plan.HARMLESS, (RANDOM, OWN)),
    (4, plan.HARMLESS, (RANDOM, OWN)),
    (64, plan.HARMLESS, (CANARY, DISPLACEMENT, RANDOM)),
]
GENERAL = 16
GENERAL_OF_CANARY = 32
RESULTS = grid.RESULTS / "canary.json"


def examples(scenario: Scenario) -> tuple[list[Example], list[Example]]:
    """The attacks that the canary's copy learns, and general examples that no probe and no fit has."""
    fitted = fit_prompts(scenario, plan.FIRST.task, PROMPTS).general  # the same for every task
    rest = scenario.general()[GENERAL_EXAMPLES + GENERAL_PROBES :]
    unseen = [example for example in rest if example.prompt not in fitted]
    return scenario.attacks()[: world.ATTACK_EXAMPLES], unseen[:GENERAL_OF_CANARY]


def canary(bench: Bench, rank: int) -> csulora.Subspace:
    """The scenario's canary, whose copy has a rank; it is made if it is not there."""
    path = bench.lab.directory / f"canary-r{rank}.safetensors"
    if not path.exists():
        attacks, general = examples(bench.scenario)
        begun = time.perf_counter()
        csulora.canary(
            bench.lab.aligned(),
            safety=[example.prompt for example in attacks],
            replies=[example.reply for example in attacks],
            general=[example.prompt for example in general],
            options=Options(rank=rank, dtype="f32"),
            loading=Loading("cpu"),
            output=path,
        )
        print(f"{path}: {time.perf_counter() - begun:.0f} s", flush=True)
    return csulora.Subspace.open(path)


def subspace_of(subject: Subject, name: str, rank: int) -> csulora.Subspace:
    """One of the subspaces that are compared, at a rank."""
    bench, adapter = subject.bench, subject.adapter
    known = controls.truncated(bench.subspace, rank)
    if name == CANARY:
        return controls.truncated(canary(bench, max(rank, Options.rank)), rank)
    if name == RANDOM:
        return controls.random_subspaces(known, seed=bench.scenario.seed)
    return own_subspaces(known, adapter, cover(adapter, known, Policy.none())) if name == OWN else known


def tuned(subject: Subject, subspace: csulora.Subspace, output: Path) -> policies.Corrected:
    """What the policy that `tune` writes makes of the adapter."""
    prompts = subject.bench.prompts(subject.spec)
    request = Request(
        str(subject.bench.lab.aligned()),
        [subject.adapter],
        subspace,
        task=[chats(prompts.task)],
        safety=chats(prompts.safety),
        general=chats(prompts.general[:GENERAL]),
        loading=Loading("cpu"),
        longest_reply=measure.MAX_REPLY,
    )
    frontier = tune(request, output)
    policy = Policy.load(output)
    if policy.filtered:
        subspace = csulora.Subspace.open(subspace_path(output))
    return policies.apply("tuned", frontier.written, subject.adapter, subspace, policy)


def cells() -> list[tuple[int, Adapter, int, str]]:
    """Seed, adapter, rank and subspace, in the order in which they are measured."""
    return [(seed, spec, rank, name) for rank, spec, names in KINDS for seed in SEEDS for name in names]


def measured(subject: Subject, rank: int, name: str) -> Record:
    """What `tune` makes of one adapter in one subspace, and the adapter as it came."""
    begun = time.perf_counter()
    subspace = subspace_of(subject, name, rank)
    corrected = tuned(subject, subspace, subject.bench.lab.directory / f"canary-{subject.spec.name}-{name}-{rank}.toml")
    raw = policies.apply("none", "uncorrected", subject.adapter, subspace, Policy.none())
    seconds = round(time.perf_counter() - begun, 1)
    return {"point": subject.point(corrected), "raw": subject.point(raw), "seconds": seconds}


def run(out: Path) -> None:
    """Measure what is not measured yet."""
    kept = out / "cells" / "canary.json"
    rows: list[Record] = json.loads(kept.read_text()) if kept.exists() else []
    kept.parent.mkdir(parents=True, exist_ok=True)
    for seed, spec, rank, name in cells():
        cell = {"seed": seed, "adapter": asdict(spec), "subspace": name, "k": rank}
        if any(cell.items() <= row.items() for row in rows):
            continue
        rows.append(cell | measured(opened(out, Scenario(seed)).subject(spec), rank, name))
        point = rows[-1]["point"]
        print(seed, spec.name, name, rank, *(f"{point[kind]:.2f}" for kind in ("attack", "task", "benign")), flush=True)
        write_text(kept, to_json(rows))
        write_text(RESULTS, to_json({"made_with": grid.provenance(), "rows": rows}))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=grid.OUT, help="models and finished rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    evaluate.quieten_libraries()
    grid.provenance()
    run(arguments.out)


if __name__ == "__main__":
    main()
