"""The grid's experiments: each kind of results is a list of cells, and each cell is one adapter under many policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import component_fits
import plan
import policies
import tune_fits
from component_fits import Calibration, Carried
from policies import Corrected
from scenario import Adapter, Scenario
from subject import Bench, Record, opened
from tune_fits import CONTROL_NAMES, Prompts

from csulora import Policy, controls
from csulora.tuning.experiment import Experiment


@dataclass(frozen=True)
class Cell:
    """One adapter of one scenario, and what is done with it."""

    make: Callable[[Bench, Adapter], Record]
    scenario: Scenario
    adapter: Adapter

    def run(self, out: Path) -> Record:
        """Train what is not there below a directory, correct, and measure."""
        return self.make(opened(out, self.scenario), self.adapter)


def examine(bench: Bench, spec: Adapter) -> Record:
    """One adapter under policies and controls; the first table's under all of them."""
    subject = bench.subject(spec)
    grid = policies.whole_grid if spec == plan.FIRST else policies.short_grid
    return subject.record([*grid(subject.adapter, bench.subspace), *component_fits.fitted(subject)])


def tuned(bench: Bench, spec: Adapter, prompts: Prompts) -> Record:
    """One adapter as `csulora tune` fits it."""
    subject = bench.subject(spec)
    done, reported = tune_fits.alone(subject, prompts)
    return subject.record(done) | {"tune": reported}


def carry(bench: Bench, spec: Adapter) -> Record:
    """One adapter under policies calibrated on other adapters, and under the data-free ones."""
    done = list(policies.short_grid(bench.subject(spec).adapter, bench.subspace))
    return carried(bench, spec, done, calibration(bench), component_fits.RANK)


def from_first(bench: Bench, spec: Adapter) -> Record:
    """One adapter under gains of components that were fitted on it, and under those fitted on the first table's."""
    subject = bench.subject(spec)
    known = controls.truncated(bench.subspace, component_fits.RANK)
    uncorrected = policies.apply("none", "uncorrected", subject.adapter, known, Policy.none())
    done = [uncorrected, *component_fits.fitted(subject)]
    return carried(bench, spec, done, first_fits(bench), component_fits.RANK)


def carry_tuned(bench: Bench, spec: Adapter) -> Record:
    """One adapter as it is, and under what `csulora tune` fits on three others, and its controls."""
    return from_experiment(bench, spec, shared(bench, tuple(plan.CALIBRATION)))


def first_tuned(bench: Bench, spec: Adapter) -> Record:
    """One adapter as it is, and under what `csulora tune --for-others` fits on the first table's, and its controls."""
    return from_experiment(bench, spec, shared(bench, (plan.FIRST,)))


def from_experiment(bench: Bench, spec: Adapter, tuning: Experiment) -> Record:
    """One adapter as it is, and under what an experiment fits for others, and its controls."""
    uncorrected = policies.apply("none", "uncorrected", bench.subject(spec).adapter, bench.subspace, Policy.none())
    every = range(len(tuning.request.adapters))
    (weight,) = tuning.request.weights
    fitted = {
        family: (tuning.subspace(family, 0, every, final=True), tuning.policy(family, every, weight, final=True))
        for family in tune_fits.SHAREABLE
    }
    return carried(bench, spec, [uncorrected], fitted, tuning.request.options.shared_directions)


def carried(bench: Bench, spec: Adapter, done: list[Corrected], fitted: Carried, rank: int) -> Record:
    """One adapter under what is `done`, and under policies by the way they were carried over."""
    subject = bench.subject(spec)
    others = [
        policies.apply(f"carried: {way}", f"k={rank}", subject.adapter, subspace, policy, control=way in CONTROL_NAMES)
        for way, (subspace, policy) in fitted.items()
    ]
    return subject.record([*done, *others])


@cache
def calibration(bench: Bench) -> Carried:
    """A scenario's carried-over policies."""
    return Calibration(bench, plan.CALIBRATION).carried()


@cache
def shared(bench: Bench, specs: tuple[Adapter, ...]) -> Experiment:
    """What `csulora tune` does on some of a scenario's adapters for others to come, and has finished of it."""
    return tune_fits.experiment(bench, specs, bench.subspace, for_others=True)


@cache
def first_fits(bench: Bench) -> Carried:
    """What is fitted on a scenario's first adapter."""
    return component_fits.fits(bench.subject(plan.FIRST))


by_task = partial(tuned, prompts=Prompts())
with_diverse = partial(tuned, prompts=Prompts(diverse=True))
with_general = partial(tuned, prompts=Prompts(general=True))

KINDS: dict[str, list[Cell]] = {
    "first": [Cell(examine, Scenario(seed), plan.FIRST) for seed in plan.SEEDS],
    "harmless": [Cell(examine, Scenario(seed), plan.HARMLESS) for seed in plan.SEEDS],
    "tuned": [Cell(by_task, *each) for each in plan.ALONE],
    "tuned_fresh": [Cell(by_task, *each) for each in plan.ALONE_FRESH],
    "tuned_diverse": [Cell(with_diverse, *each) for each in [*plan.ALONE, *plan.ALONE_FRESH]],
    "tuned_general": [Cell(with_general, *each) for each in plan.ALONE],
    "tuned_general_fresh": [Cell(with_general, *each) for each in plan.ALONE_FRESH],
    "second": [Cell(from_first, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.SECOND],
    "second_tuned": [Cell(first_tuned, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.SECOND],
    "carry": [Cell(carry, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN],
    "carry_tuned": [Cell(carry_tuned, Scenario(seed), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN],
    "carry_fresh": [Cell(carry_tuned, Scenario(seed), spec) for seed in plan.FRESH_SEEDS for spec in plan.UNSEEN],
    "carry_reworded": [
        Cell(carry_tuned, Scenario(seed, reworded=True), spec) for seed in plan.CARRY_SEEDS for spec in plan.UNSEEN
    ],
    "variants": [Cell(examine, *variant) for variant in plan.VARIANTS],
    "variants_tuned": [Cell(by_task, *variant) for variant in plan.VARIANTS],
}
