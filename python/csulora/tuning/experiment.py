"""The experiment behind a policy: what is fitted and measured, in which order, and what is chosen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from csulora.extraction.model_pair import Progress
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning import estimate, sweep
from csulora.tuning.counter import Counter
from csulora.tuning.examples import Examples
from csulora.tuning.families import CONTROLS, Family, candidates
from csulora.tuning.fitting import Fitting
from csulora.tuning.frontier import Frontier, Point
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.measurement import Measurement, Use
from csulora.tuning.recommendation import best_correction, best_of, judge, plain_scaling, preference
from csulora.tuning.request import Request
from csulora.tuning.splits import Split
from csulora.tuning.stages import Stages
from csulora.tuning.sweep import Candidate
from csulora.tuning.targets import Targets
from csulora.tuning.undo_limit import undo_limit

Note = Callable[[str], None]
"""Is called with sentences for the user."""


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
        note: Note = lambda _: None,
    ) -> None:
        """Continue what an unfinished run of the same request left.

        Args:
            request: what to work on.
            output: the policy file.
            progress: is called with what begins, and how much of the most that there is to do is done; both count time.
            language_model: the request's aligned model, if it is loaded already.
            note: is called with sentences for the user, such as how long the run will take.

        Raises:
            InputError, RefusedError: an adapter does not fit the subspace file, or ``output`` cannot be written.
        """
        self.request, self.note = request, note
        self.stages = Stages(output, request.identity)
        targets = Targets.of(request)
        kinds: tuple[type[Family], ...] = (*candidates(request), *CONTROLS)
        self.families = {kind.name: kind(request, targets) for kind in kinds}
        self.examples = Examples(request, language_model)
        self.counter = Counter(progress, 0)
        self.fitting = Fitting(request, targets, self.examples, self.stages, self.counter)
        self.measurement = Measurement(self.examples, self.stages, self.counter)

    def run(self) -> Result:
        """Fit and measure everything that matters, and choose."""
        for certain in estimate.doubts_about_prompts(self.request):
            self.note(certain)
        self._estimate()
        points = [self._unfitted(candidate, "plain scaling") for candidate in self._scalings]
        if doubt := estimate.doubt_about_verdict(self.request, plain_scaling(points)):
            self.note(doubt)
        points += self.tuned.values()
        if self.request.controls or best_of(points).choice.value <= plain_scaling(points).choice.value:
            points += (self._unfitted(preset, "presets") for preset in self._presets)
        if self.request.controls:
            points += (self._point(family, self.best_weight) for family in self._controls)
        found, written = best_correction(points), best_of(points)
        best = self._as_written(found)
        is_better, verdict = judge(best, plain_scaling(points))
        written = best if is_better or written is found else written
        points = [best if point is found else point for point in points]
        policy, subspace = self._policy_of(written)
        policy = self._limited(policy)
        self.counter.done = self.counter.total
        self.counter.tick("")
        frontier = Frontier(
            subspace_sha256=subspace.sha256,
            adapters=tuple(adapter.path.resolve().name for adapter in self.request.adapters),
            points=tuple(sorted(points, key=lambda point: (point.family, point.policy))),
            recommended=best.policy if is_better else None,
            written=written.policy,
            verdict="; ".join([verdict, *self._doubts()]),
            prompts=self._prompts(),
        )
        provenance = replace(self.request.provenance, verdict=frontier.verdict, beats_plain_scaling=is_better)
        return Result(frontier, sweep.pinned(policy, subspace.sha256, provenance), subspace)

    def policy(self, family: str, numbers: Sequence[int], weight: float, *, final: bool = False) -> Policy:
        """Return a family's policy fitted on some adapters, the task prompts weighing so much.

        Args:
            family: a key of `families`.
            numbers: positions of adapters in the request.
            weight: of task prompts and of general prompts, where safety prompts weigh 1.
            final: whether prompts of the validation split are fitted, too, as for the policy that is written.

        Raises:
            InputError, RefusedError: the model does not fit the prompts or the adapters.
        """
        return self.fitting.policy(self.families[family], numbers, weight, final=final)

    def subspace(self, family: str, number: int, numbers: Sequence[int], *, final: bool = False) -> Subspace:
        """Return the subspace file with which that policy is used on adapter ``number``."""
        return self.fitting.subspace(self.families[family], number, numbers, final=final)

    @cached_property
    def tuned(self) -> dict[tuple[str, float], Point]:
        """Family and weight of the task prompts -> the point of the candidate that was fitted so.

        One that keeps everything on the validation split is the last: no other could keep more.
        """
        found: dict[tuple[str, float], Point] = {}
        for family, weight in itertools.product(self._candidates, self.request.weights):
            found[family.name, weight] = point = self._point(family, weight)
            if point.choice.value == 1:
                break
        return found

    @property
    def best_weight(self) -> float:
        """The weight whose fit keeps most of all on the validation split."""
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

    @property
    def _scalings(self) -> list[Candidate]:
        return [sweep.untouched(self.request.policy_fields), *sweep.scalings(self.request.policy_fields)]

    @property
    def _presets(self) -> list[Candidate]:
        return sweep.presets(self.request.policy_fields)

    def _unfitted(self, candidate: Candidate, stage: str) -> Point:
        """The point of a preset or of plain scaling."""
        uses = [Use(number, self.request.subspace, candidate.policy) for number in self._every]
        return self.measurement.point(candidate.family, candidate.name, candidate.family == "scaling", uses, stage)

    def _as_written(self, point: Point) -> Point:
        """The point of a correction once nothing is left to choose: with the test figures of the policy to write.

        With several adapters it is as it was: each was left out of the fit that is measured on it.
        """
        if len(self._every) > 1 or point not in self.tuned.values():
            return point
        policy, subspace = self._policy_of(point)
        uses = [Use(number, subspace, policy) for number in self._every]
        written = self.measurement.point(point.family, f"{point.policy} finally", point.control, uses, "last fit")
        return replace(written, policy=point.policy, validation=point.validation)

    def _policy_of(self, point: Point) -> tuple[Policy, Subspace]:
        """The policy of a point that is no control, and its subspace file; a fitted one has all that is not tested."""
        for (family, weight), tuned in self.tuned.items():
            if (tuned.family, tuned.policy) == (point.family, point.policy):
                policy = self.policy(family, self._every, weight, final=True)
                filtered = self.subspace(family, 0, self._every, final=True) if policy.filtered else None
                return policy, filtered or self.request.subspace
        found = (each.policy for each in [*self._scalings, *self._presets] if each.name == point.policy)
        return next(found), self.request.subspace

    def _limited(self, policy: Policy) -> Policy:
        """A policy with the limit on undo that was asked for."""
        if not self.request.limit_undo:
            return policy
        limit = undo_limit(self.request.adapters, self.request.subspace, self.request.untuned)
        self.note(
            f"refuses adapters that undo more than {limit:.3f} of their alignment, as none of the given ones does"
        )
        return replace(policy, max_total_undo=limit)

    def _point(self, family: Family, weight: float) -> Point:
        """A fitted family's point: each adapter after a fit on the others, or the one adapter after a fit on itself."""
        uses = []
        for number in self._every:
            others = [other for other in self._every if other != number or len(self._every) == 1]
            subspace = self.fitting.subspace(family, number, others)
            uses.append(Use(number, subspace, self.fitting.policy(family, others, weight)))
        name = f"{family.name} {weight:g}"
        return self.measurement.point(family.name, name, family.is_control, uses, f"fit {name}")

    def _doubts(self) -> Iterator[str]:
        """What was not measured, and may be gone without a trace in the figures."""
        if self.request.is_for_others and len(self.request.adapters) == 1:
            yield "measured on the adapter it was fitted on, not on others"
        if not self.request.general:
            yield "not measured on general prompts"
        if self.request.loading.load_in:
            yield f"measured on the model in {self.request.loading.load_in}, not on its own weights"

    def _prompts(self) -> dict[str, dict[str, int]]:
        """How many prompts of each kind each split has."""
        every = {split: [self.examples.part(number, split).kinds for number in self._every] for split in Split}
        return {
            split.value: {
                name: sum(len(kinds[at]) for kinds in parts) for at, name in enumerate(("safety", "task", "general"))
            }
            for split, parts in every.items()
        }

    def _estimate(self) -> None:
        """Take the time of a measurement and of a step of a fit, and say how long the run will take."""
        self.counter.total = 1
        self.counter.tick("replies", 0)
        self.examples.prepare()
        self.measurement.check_refusals()
        begun = time.perf_counter()
        self.measurement.measure(Use(0, self.request.subspace, self.request.untuned))
        measured = time.perf_counter() - begun
        stepped = self.fitting.step_seconds(self._candidates[-1])  # without input filters where there is a choice
        self.counter.measurement, self.counter.step = (max(1, round(1e3 * each)) for each in (measured, stepped))
        least, self.counter.total = self._least_and_most()
        self.note(
            f"takes {estimate.duration(least / 1e3, self.counter.total / 1e3)} here, and "
            f"{estimate.memory(self.examples.language_model.device)}"
        )

    def _least_and_most(self) -> tuple[int, int]:
        """Milliseconds of a run whose first fit keeps everything, and of one with all fits."""
        adapters = len(self.request.adapters)
        each_left_out = adapters * (
            self.fitting.steps(max(1, adapters - 1)) * self.counter.step + self.counter.measurement
        )
        together = self.fitting.steps(adapters) * self.counter.step
        scalings, presets = (
            adapters * len(each) * self.counter.measurement for each in (self._scalings, self._presets)
        )
        controls = presets + len(self._controls) * each_left_out if self.request.controls else 0
        every = len(self._candidates) * len(self.request.weights)
        least = scalings + each_left_out + together + controls
        return least, scalings + presets + every * each_left_out + together + max(0, controls - presets)
