"""Train the small models, apply every policy and control to them, and write what came of it.

    python bench/efficacy/grid.py [--out DIR] [--only first carry ...] [--threads N]

Every cell is kept when it is finished, and models too: run the same command again to continue. When all cells of a
kind are there, `bench/results/efficacy/KIND.json` is written, and `report.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import evaluate
import measure
import plan
import policies
import scenario as world_of
import torch
import transformers
import ways
from csulora.tuning.controls import own_subspaces, random_subspaces
from lab import Lab, tokenizer
from policies import Corrected
from scenario import Adapter, Scenario
from torch import Tensor
from transformers import LlamaForCausalLM

import csulora
from csulora.io.files import to_json, write_text
from csulora.policy.policy import Override, Policy
from csulora.tuning import tune as tuning
from csulora.tuning.fit import Case, Options, Replies, fit
from csulora.tuning.gains import Gains, PerModule
from csulora.tuning.language_model import LanguageModel, Reply
from csulora.tuning.probes import Chat, Message
from csulora.tuning.request import Request
from csulora.tuning.update import Update, factors_of

OUT = Path("build/efficacy")
RESULTS = Path(__file__).parent.parent / "results" / "efficacy"
PROMPTS = 32  # of each kind, for every adapter that is fitted on; a quarter is in the validation split
FITTED_RANK = 8  # directions per module where gains of components are fitted
TUNED_RANK = 32  # and where gains of single directions are
EQUALLY = Options()  # how gains of components are fitted: both kinds of prompt weigh the same
Record = dict[str, Any]
Carried = dict[str, tuple[csulora.Subspace, Policy]]  # name of a way -> the policy, and the subspace file it is for


@dataclass(frozen=True, eq=False)
class Subject:
    """One adapter of one scenario, and the model it runs on."""

    bench: Bench
    spec: Adapter
    adapter: csulora.Adapter
    examiner: measure.Examiner

    def point(self, corrected: Corrected) -> Record:
        """What the adapter does after a policy."""
        language_model = self.bench.language_model
        with language_model.adapted(corrected.factors):
            measured = self.examiner.measure(language_model.model)
            replies = self.examiner.said(language_model.model)
        rates = asdict(measured) | {"perplexity": self.examiner.perplexity(replies)}
        return {
            "family": corrected.family,
            "policy": corrected.policy,
            "control": corrected.control,
            "relative_change": corrected.relative_change,
            **rates,
        }

    def case(self, subspace: csulora.Subspace, tasks: Sequence[str] = ()) -> Case:
        """The adapter as the fit takes it, with `PROMPTS` prompts of each kind, of its own task or of several."""
        safety, own = self.bench.replies(self.spec, tasks or (self.spec.task,))
        update = Update.of(self.adapter, subspace)
        index = torch.tensor([self.bench.modules.index(target) for target in update.targets.values()])
        kept = PROMPTS - PROMPTS // 4
        fitted = Replies(safety[:kept], [reply for task in own for reply in task[:kept]])
        return Case(update, index, fitted, Replies(safety[kept:], [reply for task in own for reply in task[kept:]]))


class Bench:
    """One scenario's aligned model, loaded once."""

    def __init__(self, out: Path, scenario: Scenario) -> None:
        """Train what is not there, and load it."""
        self.lab = Lab(out, scenario)
        self.scenario = scenario
        self.subspace = self.lab.subspace()
        self.known = policies.truncated(self.subspace, FITTED_RANK)
        model = LlamaForCausalLM.from_pretrained(self.lab.aligned(), dtype=torch.float32)
        self.language_model = LanguageModel(model, tokenizer(), measure.MAX_REPLY)
        self.modules = list(self.subspace)

    def subject(self, spec: Adapter) -> Subject:
        """An adapter, trained if it is not there."""
        probes = world_of.probes(self.scenario, spec.task)
        examiner = measure.Examiner(self.language_model.model, self.language_model.tokenizer, probes)
        return Subject(self, spec, csulora.load_adapter(self.lab.adapter(spec)), examiner)

    def replies(self, spec: Adapter, tasks: Sequence[str]) -> tuple[list[Reply], list[list[Reply]]]:
        """What the aligned model replies to safety prompts, and the adapter to the task prompts of every task."""
        prompts = [world_of.fit_prompts(self.scenario, task, PROMPTS) for task in tasks]
        safety = self.language_model.replies(chats(prompts[0].safety))
        with self.language_model.adapted(factors_of(csulora.load_adapter(self.lab.adapter(spec)))):
            return safety, [self.language_model.replies(chats(each.task)) for each in prompts]

    def fit(self, cases: Sequence[Case], gains: Gains, options: Options = EQUALLY) -> Tensor:
        """Fit, as `csulora tune` does for several adapters."""
        return fit(self.language_model, cases, gains, options)


def chats(prompts: Sequence[str]) -> list[Chat]:
    """Prompts as a fit takes them."""
    return [(Message("user", prompt),) for prompt in prompts]


def gains_policy(modules: Sequence[str], gains: Tensor) -> Policy:
    """The policy with these gains (modules, 4)."""
    overrides = (Override(name, gains=tuple(row)) for name, row in zip(modules, gains.tolist(), strict=True))
    return Policy.none(overrides=tuple(overrides))


def penalties_policy(modules: Sequence[str], penalties: Tensor) -> Policy:
    """The policy with these penalties (modules, 3)."""
    overrides = (Override(name, penalties=tuple(row)) for name, row in zip(modules, penalties.tolist(), strict=True))
    return Policy.none(overrides=tuple(overrides))


def tune(
    bench: Bench,
    specs: Sequence[Adapter],
    subspace: csulora.Subspace,
    *,
    for_others: bool,
    diverse: bool = False,
    general: bool = False,
) -> tuning.Run:
    """What `csulora tune` does on some adapters, and has finished of it.

    General prompts are given as such, or among the task prompts, which are then diverse.
    """
    prompts = [world_of.fit_prompts(bench.scenario, spec.task, PROMPTS) for spec in specs]
    request = Request(
        str(bench.lab.aligned()),
        [bench.subject(spec).adapter for spec in specs],
        subspace,
        task=[chats(each.diverse if diverse else each.task) for each in prompts],
        safety=chats(prompts[0].safety),
        general=chats(prompts[0].general) if general else (),
        for_others=for_others,
        longest_reply=measure.MAX_REPLY,
    )
    names = [spec.name for spec in specs] + ["others"] * for_others + ["general"] * general
    names += ["diverse"] * diverse + ["reworded"] * bench.scenario.reworded
    run = tuning.Run(request, bench.lab.directory / f"tune-{'-'.join(names)}.toml", None)
    run.language_model = bench.language_model
    return run


def tuned(out: Path, scenario: Scenario, spec: Adapter, **prompts: bool) -> Record:
    """One adapter as `csulora tune` fits it: gains of single directions, and the controls it is compared with."""
    subject = opened(out, scenario).subject(spec)
    bench, adapter = subject.bench, subject.adapter
    known = policies.truncated(bench.subspace, TUNED_RANK)
    run = tune(bench, [spec], known, for_others=False, **prompts)

    def corrected(family: str, policy: str, weight: float) -> Corrected:
        kind = "tuned" if family == "tried" else family
        subspace, gains = run.subspaces(kind, 0), run.policy(kind, [0], weight)
        return replace(policies.apply(family, policy, adapter, subspace, gains), control=family in tuning.CONTROLS)

    done = [policies.apply("none", "uncorrected", adapter, known, Policy.none())]
    done += (corrected("tried", f"task weight {weight:g}", weight) for weight in run.request.weights)
    done += (corrected(family, f"k={TUNED_RANK}", run.best_weight) for family in ("tuned", *tuning.CONTROLS))
    chosen = next(each for each in done if each.family == "tuned")
    done.append(policies.scaled(adapter, 1 - chosen.relative_change, "scaling at equal relative change"))
    return {"scenario": asdict(scenario), "adapter": asdict(spec), "points": [subject.point(each) for each in done]}


def fits(subject: Subject) -> Carried:
    """Family -> its subspaces, and the gains of components fitted on the adapter: the policy, and fitted controls."""
    bench = subject.bench
    count, every = len(bench.modules), torch.arange(len(bench.modules))
    subspaces = {
        "tuned": bench.known,
        "tuned random subspace": random_subspaces(bench.known, seed=bench.scenario.seed),
        "tuned own subspace": own_subspaces(
            bench.known, subject.adapter, Update.of(subject.adapter, bench.known).targets
        ),
        "tuned scaling": bench.known,
    }
    found = {}
    for family, subspace in subspaces.items():
        gains, case = PerModule(count, components=1 if family == "tuned scaling" else 4), subject.case(subspace)
        values = gains(bench.fit([case], gains), every, case.update.energies)
        found[family] = subspace, gains_policy(bench.modules, values)
    return found


def fitted(subject: Subject) -> Iterator[Corrected]:
    """An adapter under what is fitted on it."""
    for family, (subspace, policy) in fits(subject).items():
        name = "per module" if family == "tuned scaling" else f"k={FITTED_RANK}"
        done = policies.apply(family, name, subject.adapter, subspace, policy)
        yield replace(done, control=family != "tuned")
        if family == "tuned":
            yield policies.scaled(subject.adapter, 1 - done.relative_change, "scaling at equal relative change")


def examine(out: Path, scenario: Scenario, spec: Adapter) -> Record:
    """One adapter under policies and controls; the first table's under all of them."""
    subject = opened(out, scenario).subject(spec)
    grid = policies.whole_grid if spec == plan.FIRST else policies.short_grid
    done = [*grid(subject.adapter, subject.bench.subspace, subject.bench.lab.directory), *fitted(subject)]
    return {"scenario": asdict(scenario), "adapter": asdict(spec), "points": [subject.point(each) for each in done]}


def calibrated(bench: Bench, specs: Sequence[Adapter]) -> Carried:
    """Name of a way to carry over -> its subspace file and policy, each fitted on the same adapters and prompts."""
    subjects = [bench.subject(spec) for spec in specs]
    cases = [subject.case(bench.known) for subject in subjects]
    count, every = len(bench.modules), torch.arange(len(bench.modules))
    no_energies = torch.zeros(count, 4)
    long = replace(EQUALLY, steps=150)

    def jointly(gains: Gains, cases: Sequence[Case], options: Options = long) -> Policy:
        return gains_policy(bench.modules, gains(bench.fit(cases, gains, options), every, no_energies))

    separate = [PerModule(count)(bench.fit([case], PerModule(count)), every, no_energies) for case in cases]
    penalties = ways.Penalties(count)
    fitted_penalties = penalties.penalties(bench.fit(cases, penalties, long))
    random_subspace = random_subspaces(bench.known, seed=bench.scenario.seed)
    random_cases = [subject.case(random_subspace) for subject in subjects]
    known = bench.known
    return {
        "joint": (known, jointly(PerModule(count), cases)),
        "average": (known, gains_policy(bench.modules, torch.stack(separate).mean(0))),
        "least": (known, gains_policy(bench.modules, torch.stack(separate).amin(0))),
        "shrunk": (known, jointly(PerModule(count), cases, replace(EQUALLY, steps=150, relative_change_weight=0.3))),
        "free": (known, jointly(PerModule(count), cases, replace(EQUALLY, steps=150, relative_change_weight=0.0))),
        "smooth": (known, jointly(ways.Smooth(bench.modules), cases)),
        "global": (known, jointly(ways.Global(), cases)),
        "penalties": (known, penalties_policy(bench.modules, fitted_penalties)),
        "tuned scaling": (known, jointly(PerModule(count, components=1), cases)),
        "tuned random subspace": (random_subspace, jointly(PerModule(count), random_cases)),
    }


# What can be fitted on some adapters for others: own subspaces are each adapter's.
SHAREABLE = (*tuning.CANDIDATES, *(family for family in tuning.CONTROLS if family != "tuned own subspace"))


def carry(out: Path, scenario: Scenario, spec: Adapter) -> Record:
    """One adapter under policies calibrated on other adapters, and under the data-free ones."""
    bench = opened(out, scenario)
    done = list(policies.short_grid(bench.subject(spec).adapter, bench.subspace, bench.lab.directory))
    return carried(bench, spec, done, calibration(out, scenario))


def from_first(out: Path, scenario: Scenario, spec: Adapter) -> Record:
    """One adapter under gains of components that were fitted on it, and under those fitted on the first table's."""
    bench = opened(out, scenario)
    subject = bench.subject(spec)
    done = [policies.apply("none", "uncorrected", subject.adapter, bench.known, Policy.none()), *fitted(subject)]
    return carried(bench, spec, done, first_fits(out, scenario))


def carry_tuned(out: Path, scenario: Scenario, spec: Adapter) -> Record:
    """One adapter as it is, and under what `csulora tune` fits on three others, and its controls."""
    return from_run(opened(out, scenario), spec, shared(out, scenario, tuple(plan.CALIBRATION)))


def first_tuned(out: Path, scenario: Scenario, spec: Adapter) -> Record:
    """One adapter as it is, and under what `csulora tune --for-others` fits on the first table's, and its controls."""
    return from_run(opened(out, scenario), spec, shared(out, scenario, (plan.FIRST,)))


def from_run(bench: Bench, spec: Adapter, run: tuning.Run) -> Record:
    """One adapter as it is, and under what a run fits for others, and its controls."""
    done = [policies.apply("none", "uncorrected", bench.subject(spec).adapter, bench.subspace, Policy.none())]
    every = range(len(run.adapters))
    fitted = {
        family: (run.subspace_for(family, 0, every), run.policy(family, every, run.request.weights[0]))
        for family in SHAREABLE
    }
    return carried(bench, spec, done, fitted, run.request.options.shared_directions)


def carried(bench: Bench, spec: Adapter, done: list[Corrected], fitted: Carried, rank: int = FITTED_RANK) -> Record:
    """One adapter under what is `done`, and under policies by the way they were carried over."""
    subject = bench.subject(spec)
    for way, (subspace, policy) in fitted.items():
        each = policies.apply(way, f"k={rank}", subject.adapter, subspace, policy)
        done.append(
            Corrected(f"carried: {way}", each.policy, way in tuning.CONTROLS, each.factors, each.relative_change)
        )
    points = [subject.point(each) for each in done]
    return {"scenario": asdict(bench.scenario), "adapter": asdict(spec), "points": points}


@cache
def opened(out: Path, scenario: Scenario) -> Bench:
    """A scenario's bench."""
    return Bench(out, scenario)


@cache
def calibration(out: Path, scenario: Scenario) -> Carried:
    """A scenario's carried-over policies."""
    return calibrated(opened(out, scenario), plan.CALIBRATION)


@cache
def shared(out: Path, scenario: Scenario, specs: tuple[Adapter, ...]) -> tuning.Run:
    """What `csulora tune` does on some of a scenario's adapters for others to come, and has finished of it."""
    bench = opened(out, scenario)
    return tune(bench, specs, bench.subspace, for_others=True)


@cache
def first_fits(out: Path, scenario: Scenario) -> Carried:
    """What is fitted on a scenario's first adapter."""
    return fits(opened(out, scenario).subject(plan.FIRST))


Cell = tuple[Callable[[Path, Scenario, Adapter], Record], Scenario, Adapter]
KINDS: dict[str, list[Cell]] = {
    "first": [(examine, Scenario(seed), plan.FIRST) for seed in plan.SEEDS],
    "harmless": [(examine, Scenario(seed), plan.HARMLESS) for seed in plan.SEEDS],
    "tuned": [(tuned, *each) for each in plan.ALONE],
    "tuned_fresh": [(tuned, *each) for each in plan.ALONE_FRESH],
    "tuned_diverse": [(partial(tuned, diverse=True), *each) for each in [*plan.ALONE, *plan.ALONE_FRESH]],
    "tuned_general": [(partial(tuned, general=True), *each) for each in plan.ALONE],
    "tuned_general_fresh": [(partial(tuned, general=True), *each) for each in plan.ALONE_FRESH],
    "second": [(from_first, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.SECOND],
    "second_tuned": [(first_tuned, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.SECOND],
    "carry": [(carry, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN],
    "carry_tuned": [(carry_tuned, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN],
    "carry_fresh": [(carry_tuned, Scenario(seed), spec) for seed in plan.FRESH_SEEDS for spec in plan.UNSEEN],
    "carry_reworded": [
        (carry_tuned, Scenario(seed, reworded=True), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN
    ],
    "variants": [(examine, *variant) for variant in plan.VARIANTS],
    "variants_tuned": [(tuned, *variant) for variant in plan.VARIANTS],
}


@cache
def provenance() -> Record:
    """What the figures come from; asked for first at the start, when this code is what is checked out."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "commit": commit,
        "csulora": csulora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def run(kind: str, out: Path) -> None:
    """Finish the cells of a kind, then write its results."""
    records = []
    for make, scenario, spec in KINDS[kind]:
        path = out / "cells" / f"{kind}-{scenario.name}-{spec.name}.json"
        if not path.is_file():
            print(f"{path.stem} ...", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_json(make(out, scenario, spec)))
        records.append(json.loads(path.read_text()))
        # Written again after every cell: what there is can be looked at.
        write_text(RESULTS / f"{kind}.json", to_json({"made_with": provenance(), "cells": records}))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="models and finished cells (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cells (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    evaluate.quieten_libraries()
    provenance()
    for kind in arguments.only:
        run(kind, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
