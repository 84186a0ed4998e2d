"""The fits of one request: policies, and the subspace files with the input filters that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean

import torch

from csulora.policy.policy import Policy
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.subspace import Subspace
from csulora.tuning.counter import Counter
from csulora.tuning.examples import Examples
from csulora.tuning.families import Family, Rows
from csulora.tuning.filtering import input_filters
from csulora.tuning.fit import Case, fit, step_seconds
from csulora.tuning.request import Request
from csulora.tuning.splits import Split
from csulora.tuning.stages import Stages
from csulora.tuning.targets import Targets
from csulora.tuning.unaligning import unaligning
from csulora.tuning.update import Update


class Fitting:
    """Fits any family on any of a request's adapters, each fit once."""

    def __init__(
        self, request: Request, targets: Targets, examples: Examples, stages: Stages, counter: Counter
    ) -> None:
        """Keep finished fits in ``stages``, and count their steps with ``counter``."""
        self.request, self.targets, self.examples = request, targets, examples
        self.stages, self.counter = stages, counter
        self._input_filters: dict[tuple[tuple[int, ...], bool], dict[str, InputFilter]] = {}

    def steps(self, adapters: int) -> int:
        """Return the steps of a fit on so many adapters."""
        return self.request.options.steps * adapters

    def step_seconds(self, family: Family) -> float:
        """Return how long one step of a fit on the first adapter takes."""
        case = self._case(family, 0, [0], self._reference_energy(family, [0]))
        return step_seconds(self.examples.language_model, case, family.parametrization, self.request.options)

    def policy(self, family: Family, numbers: Sequence[int], weight: float, *, final: bool = False) -> Policy:
        """Return the policy fitted on some adapters, the task prompts weighing so much.

        ``final``: nothing is left to choose, so prompts of the validation split are fitted, too.
        """
        stage, begun = f"fit {family.name} {weight:g} {list(numbers)}{' finally' * final}", self.counter.done
        rows: Rows = self.stages.finish(stage, lambda: self._fit(family, numbers, weight, final))
        self.counter.finish(stage, begun, self.steps(len(numbers)) * self.counter.step)
        return family.policy(numbers, rows, self._reference_energy(family, numbers))

    def subspace(self, family: Family, number: int, numbers: Sequence[int], *, final: bool = False) -> Subspace:
        """Return what that policy is used with on adapter ``number``."""
        subspace = family.subspace(number)
        return subspace.with_input_filters(self._filters(tuple(numbers), final)) if family.is_filtered else subspace

    def _filters(self, numbers: tuple[int, ...], final: bool) -> dict[str, InputFilter]:
        if (numbers, final) not in self._input_filters:
            self._input_filters[numbers, final] = input_filters(self.examples, self.targets, numbers, _fitted(final))
        return self._input_filters[numbers, final]

    def _fit(self, family: Family, numbers: Sequence[int], weight: float, final: bool) -> Rows:
        reference_energy = self._reference_energy(family, numbers)
        options = replace(self.request.options, task_weight=weight, steps=self.steps(len(numbers)))
        case = partial(self._case, family, numbers=numbers, reference_energy=reference_energy, final=final)
        cases = [case(number) for number in numbers]
        if family.carries_over and options.unaligning_share:
            cases += [case(number, is_unaligning=True) for number in numbers]
        gains = family.parametrization
        tick = partial(self.counter.tick, f"fit {family.name} {weight:g}", self.counter.step)
        parameters = fit(self.examples.language_model, cases, gains, options, tick)
        rows: Rows = gains.gains(parameters).tolist()
        return rows

    def _case(
        self,
        family: Family,
        number: int,
        numbers: Sequence[int],
        reference_energy: float | None,
        *,
        final: bool = False,
        is_unaligning: bool = False,
    ) -> Case:
        language_model, adapter = self.examples.language_model, self.request.adapters[number]
        subspace = self.subspace(family, number, numbers, final=final)
        if is_unaligning:
            options, targets = self.request.options, self.targets.each[number]
            adapter = unaligning(adapter, subspace, targets, options.shared_directions, options.unaligning_share)
        update = Update.of(adapter, subspace, self.request.untuned)
        if not family.is_filtered:
            update = replace(update, input_filters={})  # which the subspace file may have from an earlier policy
        if reference_energy is not None:
            update = update.with_penalty_scale(self.request.options.shared_directions, reference_energy)
        update = update.to(language_model.device, language_model.device_of)
        index = torch.tensor(self.targets.rows(number)).to(language_model.device)
        return Case(update, index, self.examples.part(number, *_fitted(final)))

    def _reference_energy(self, family: Family, numbers: Sequence[int]) -> float | None:
        """The geometric mean of the energies of a fit's adapters, if their policy is to follow that of others."""
        if not family.carries_over:
            return None
        energies = [self._energy(family, number) for number in numbers]
        return geometric_mean(energies) if all(energies) else None

    def _energy(self, family: Family, number: int) -> float:
        def measure() -> float:
            update = Update.of(self.request.adapters[number], family.subspace(number), self.request.untuned)
            return update.energy_along(self.request.options.shared_directions)

        return float(self.stages.finish(f"energy {family.name} {number}", measure))


def _fitted(final: bool) -> tuple[Split, ...]:
    """The splits whose prompts a fit has."""
    return (Split.training, Split.validation) if final else (Split.training,)
