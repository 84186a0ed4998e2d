"""What policies are worth: measured on prompts of every adapter that are not fitted, as `correct` would write it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from csulora.correction.correct import correct
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.counter import Counter
from csulora.tuning.examples import Examples
from csulora.tuning.frontier import Point, Rate, Refusals
from csulora.tuning.language_model import agreeing
from csulora.tuning.refusals import refused_by_aligned, refusing
from csulora.tuning.replies import Reply
from csulora.tuning.splits import HELD_OUT, Split
from csulora.tuning.stages import Stages

Counts = dict[str, Any]
"""The relative change, and per split how many replies stay, by what is counted."""

_KINDS = (("safety", "refused"), ("task", "over-refused"))  # what is counted of safety and of task prompts


@dataclass(frozen=True)
class Use:
    """A policy as it is used on one adapter of a request, given by its number, and the subspace file it is for."""

    number: int
    subspace: Subspace
    policy: Policy


class Measurement:
    """Measures policies on a request's adapters, each once."""

    def __init__(self, examples: Examples, stages: Stages, counter: Counter) -> None:
        """Keep what is measured in ``stages``."""
        self.examples, self.request = examples, examples.request
        self.stages, self.counter = stages, counter

    def point(self, family: str, name: str, control: bool, uses: Sequence[Use], stage: str) -> Point:
        """Return a policy's point, or that of one for each adapter, over all adapters' prompts that are not fitted.

        Progress is told as that of ``stage``.
        """
        results = []
        for use in uses:
            self.counter.tick(stage, self.counter.measurement)
            results.append(self.stages.finish(f"measure {name} on {use.number}", partial(self.measure, use)))
        change = math.sqrt(sum(result["relative_change"] ** 2 for result in results) / len(results))
        validation, test = (self._rates(uses, results, split) for split in HELD_OUT)
        chosen_by = Point(family, name, control, relative_change=change, **validation).least
        return Point(family, name, control, relative_change=change, validation=chosen_by, **test)

    def _rates(self, uses: Sequence[Use], results: Sequence[Counts], split: Split) -> dict[str, Any]:
        """The shares of a split's prompts, as fields of a point."""
        parts = [self.examples.part(use.number, split) for use in uses]
        safety, task, general = (sum(len(part.kinds[kind]) for part in parts) for kind in range(3))

        def rate(what: str, count: int) -> Rate:
            return Rate.of(sum(result[split][what] for result in results), count)

        refusals = Refusals(rate("refused", safety), rate("over-refused", task)) if self.request.refusals else None
        return {
            "safety": rate("safety", safety),
            "task": rate("task", task),
            "refusals": refusals,
            "general": rate("general", general) if general else None,
        }

    def measure(self, use: Use) -> Counts:
        """Return how many replies stay on an adapter's prompts that are not fitted, and |X - dW| / |dW|."""
        fixed, report = correct(self.request.adapters[use.number], use.subspace, use.policy)
        parts = [self.examples.part(use.number, split) for split in HELD_OUT]
        own = [kind for part in parts for kind in part.kinds]
        of_aligned = [self.examples.general_part(split) for split in HELD_OUT]
        with self.examples.adapted(fixed):
            agree = self._by_kind(partial(agreeing, self.examples.language_model), [*own, *of_aligned])
            refuse = self._by_kind(self._refusing, own) if self.request.refusals else None
        found: Counts = {"relative_change": report.totals.relative_change}
        for number, split in enumerate(HELD_OUT):
            counts = found[split] = {}
            *own_kinds, own_general = range(3 * number, 3 * number + 3)
            for kind, (kept, refused) in zip(own_kinds, _KINDS, strict=True):
                counts[kept] = sum(agree[kind])
                if refuse:
                    counts[refused] = sum(refuse[kind])
            if refuse:  # general prompts need only be answered
                counts["general"] = sum(not each for each in refuse[own_general])
            else:  # either model's answer will do
                counts["general"] = sum(map(max, agree[own_general], agree[2 * 3 + number]))
        return found

    def _by_kind(
        self, judge: Callable[[list[Reply]], list[bool]], kinds: Sequence[Sequence[Reply]]
    ) -> list[list[bool]]:
        """What is judged of all replies together, by kind."""
        every = iter(judge([reply for kind in kinds for reply in kind]))
        return [list(islice(every, len(kind))) for kind in kinds]

    def check_refusals(self) -> None:
        """Check that what refusals hold is what the aligned model says when it refuses.

        Raises:
            InputError: no reply of the aligned model to a safety prompt holds it, so every policy would fail.
        """
        if self.request.refusals:
            refused_by_aligned(self.examples.language_model, self.examples.replies[0].safety, self.request.refusals)

    def _refusing(self, replies: list[Reply]) -> list[bool]:
        return refusing(self.examples.language_model, replies, self.request.refusals)
