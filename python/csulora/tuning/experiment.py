"""The experiment behind a policy: every family is fitted, and everything is measured on validation prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from csulora.extraction.model_pair import Progress
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning import sweep
from csulora.tuning.counter import Counter
from csulora.tuning.examples import Examples
from csulora.tuning.families import CONTROLS, Family, candidates
from csulora.tuning.fitting import Fitting
from csulora.tuning.frontier import Frontier, Point
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.measurement import Measurement, Use
from csulora.tuning.recommendation import eligible, preference, recommend
from csulora.tuning.request import Request
from csulora.tuning.stages import Stages
from csulora.tuning.sweep import Candidate
from csulora.tuning.targets import Targets


@dataclass(frozen=True)
class Result:
    """What an experiment found: the frontier, the policy to write, and the subspace file that it is for."""

    frontier: Frontier
    policy: Policy
    subspace: Subspace


class Experiment:
    """One run of `tune`, whose finished fits and figures lie beside ``output``.

    Attributes:
        families: every family of fits by its name, candidates first.
    """

    def __init__(
        self,
        request: Request,
        output: Path,
        progress: Progress | None = None,
        language_model: LanguageModel | None = None,
    ) -> None:
        """Continue what an unfinished run of the same request left.

        Args:
            request: what to work on.
            output: the policy file.
            progress: is called with what begins, how many steps are done, and how many there are at most.
            language_model: the request's aligned model, if it is loaded already.

        Raises:
            InputError, RefusedError: an adapter does not fit the subspace file, or ``output`` cannot be written.
        """
        self.request = request
        self.stages = Stages(output, request.identity)
        targets = Targets.of(request)
        kinds: tuple[type[Family], ...] = (*candidates(request), *CONTROLS)
        self.families = {kind.name: kind(request, targets) for kind in kinds}
        self.examples = Examples(request, language_model)
        self.counter = Counter(progress, 0)
        self.fitting = Fitting(request, targets, self.examples, self.stages, self.counter)
        self.counter.total = self._total()
        self.measurement = Measurement(self.examples, self.stages, self.counter)

    def run(self) -> Result:
        """Fit and measure everything, and choose."""
        points, policies = self._unfitted()
        points += self.tuned.values()
        points += (self._point(family, self.best_weight) for family in self._controls)
        for (name, weight), point in self.tuned.items():
            policies[point.policy] = self.policy(name, self._every, weight)
        self.counter.tick("")
        points = sorted(points, key=lambda point: (point.family, point.policy))
        chosen, verdict = recommend(points)
        best = chosen or max((point for point in eligible(points) if point.policy in policies), key=preference)
        policy = policies[best.policy]
        subspace = self.subspace(best.family, 0, self._every) if policy.filtered else self.request.subspace
        frontier = Frontier(
            subspace_sha256=subspace.sha256,
            adapters=tuple(adapter.path.resolve().name for adapter in self.request.adapters),
            points=tuple(points),
            recommended=chosen.policy if chosen else None,
            written=best.policy,
            verdict="; ".join([verdict, *self._doubts()]),
        )
        return Result(frontier, sweep.pinned(policy, subspace.sha256, self.request.provenance), subspace)

    def policy(self, family: str, numbers: Sequence[int], weight: float) -> Policy:
        """Return a family's policy fitted on some adapters, the task prompts weighing so much.

        Args:
            family: a key of `families`.
            numbers: positions of adapters in the request.
            weight: of task prompts and of general prompts, where safety prompts weigh 1.

        Raises:
            InputError, RefusedError: the model does not fit the prompts or the adapters.
        """
        return self.fitting.policy(self.families[family], numbers, weight)

    def subspace(self, family: str, number: int, numbers: Sequence[int]) -> Subspace:
        """Return the subspace file with which that policy is used on adapter ``number``."""
        return self.fitting.subspace(self.families[family], number, numbers)

    @cached_property
    def tuned(self) -> dict[tuple[str, float], Point]:
        """Family and weight of the task prompts -> the point of the candidate that was fitted so."""
        every = itertools.product(self._candidates, self.request.weights)
        return {(family.name, weight): self._point(family, weight) for family, weight in every}

    @property
    def best_weight(self) -> float:
        """The weight whose fit keeps most of both on the prompts in the validation split."""
        return max(self.tuned, key=lambda candidate: preference(self.tuned[candidate]))[1]

    @property
    def _every(self) -> range:
        return range(len(self.request.adapters))

    @property
    def _candidates(self) -> list[Family]:
        return [family for family in self.families.values() if not family.is_control]

    @property
    def _controls(self) -> list[Family]:
        return [family for family in self.families.values() if family.is_control]

    def _plain(self) -> list[Candidate]:
        return [*sweep.presets(self.request.policy_fields), *sweep.scalings(self.request.policy_fields)]

    def _unfitted(self) -> tuple[list[Point], dict[str, Policy]]:
        """The points of presets and plain scalings, and their policies."""
        points = []
        for candidate in self._plain():
            uses = [Use(number, self.request.subspace, candidate.policy) for number in self._every]
            is_control = candidate.family == "scaling"
            points.append(self.measurement.point(candidate.family, candidate.name, is_control, uses))
        return points, {candidate.name: candidate.policy for candidate in self._plain()}

    def _point(self, family: Family, weight: float) -> Point:
        """A fitted family's point: each adapter after a fit on the others, or the one adapter after a fit on itself."""
        uses = []
        for number in self._every:
            others = [other for other in self._every if other != number or len(self._every) == 1]
            subspace = self.fitting.subspace(family, number, others)
            uses.append(Use(number, subspace, self.fitting.policy(family, others, weight)))
        return self.measurement.point(family.name, f"{family.name} {weight:g}", family.is_control, uses)

    def _doubts(self) -> Iterator[str]:
        """What was not measured, and may be gone without a trace in the figures."""
        if self.request.is_for_others and len(self.request.adapters) == 1:
            yield "measured on the adapter it was fitted on, not on others"
        if not self.request.general:
            yield "not measured on general prompts"
        if self.request.loading.load_in:
            yield f"measured on the model in {self.request.loading.load_in}, not on its own weights"

    def _total(self) -> int:
        """The most steps of all fits, and the number of measurements."""
        adapters = len(self.request.adapters)
        fitted = len(self.request.weights) * len(self._candidates)
        kinds = fitted + len(self._controls)
        measured = adapters * (len(self._plain()) + kinds)
        each_left_out = adapters * kinds * self.fitting.steps(max(1, adapters - 1))
        together = fitted * self.fitting.steps(adapters) if adapters > 1 else 0
        return measured + each_left_out + together
