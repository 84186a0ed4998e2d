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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import evaluate
import grid
import measure
import plan
import policies
import torch
import world
from scenario import GENERAL_EXAMPLES, GENERAL_PROBES, Adapter, Scenario
from subject import PROMPTS, Bench, Record, Subject, chats, opened

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
RANKS = (16, 4, 64)  # the most telling first
GENERAL = 16
GENERAL_OF_CANARY = 32
RESULTS = grid.RESULTS / "canary.json"


def canary(bench: Bench, rank: int) -> csulora.Subspace:
    """The scenario's canary, whose copy has a rank; it is made if it is not there."""
    path = bench.lab.directory / f"canary-r{rank}.safetensors"
    if not path.exists():
        scenario = bench.scenario
        attacks = scenario.attacks()[: world.ATTACK_EXAMPLES]
        after = GENERAL_EXAMPLES + GENERAL_PROBES + PROMPTS  # of what probes and fits take
        begun = time.perf_counter()
        csulora.canary(
            bench.lab.aligned(),
            safety=[example.prompt for example in attacks],
            replies=[example.reply for example in attacks],
            general=[example.prompt for example in scenario.general()[after:][:GENERAL_OF_CANARY]],
            options=Options(rank=rank, dtype="f32"),
            loading=Loading("cpu"),
            output=path,
        )
        print(f"{path}: {time.perf_counter() - begun:.0f} s", flush=True)
    return csulora.Subspace.open(path)


def subspaces(subject: Subject, rank: int) -> Iterator[tuple[str, csulora.Subspace]]:
    """The subspaces that are compared at a rank, by name; the adapter's own has no more than the adapter's."""
    bench, adapter = subject.bench, subject.adapter
    known = controls.truncated(bench.subspace, rank)
    yield "canary", controls.truncated(canary(bench, max(rank, 16)), rank)
    yield "displacement", known
    yield "random", controls.random_subspaces(known, seed=bench.scenario.seed)
    if rank <= subject.spec.rank:
        yield "own", own_subspaces(known, adapter, cover(adapter, known, Policy.none()))


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


def cells() -> list[tuple[int, Adapter, int]]:
    """Seed, adapter and rank, in the order in which they are measured."""
    return [(seed, spec, rank) for rank in RANKS for spec in (plan.FIRST, plan.HARMLESS) for seed in SEEDS]


def run(out: Path) -> None:
    """Measure what is not measured yet."""
    kept = out / "cells" / "canary.json"
    rows: list[Record] = json.loads(kept.read_text()) if kept.exists() else []
    kept.parent.mkdir(parents=True, exist_ok=True)
    for seed, spec, rank in cells():
        subject = opened(out, Scenario(seed)).subject(spec)
        for name, subspace in subspaces(subject, rank):
            cell = {"seed": seed, "adapter": asdict(spec), "subspace": name, "k": rank}
            if any(cell.items() <= row.items() for row in rows):
                continue
            begun = time.perf_counter()
            corrected = tuned(subject, subspace, subject.bench.lab.directory / f"canary-{spec.name}-{name}-{rank}.toml")
            raw = policies.apply("none", "uncorrected", subject.adapter, subspace, Policy.none())
            point, before = subject.point(corrected), subject.point(raw)
            rows.append(cell | {"point": point, "raw": before, "seconds": round(time.perf_counter() - begun, 1)})
            print(
                seed,
                spec.name,
                name,
                rank,
                *(f"{point[kind]:.2f}" for kind in ("attack", "task", "benign")),
                flush=True,
            )
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
