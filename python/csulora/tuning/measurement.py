"""What policies are worth: measured on the validation prompts of every adapter, as `correct` would write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from csulora.correction.correct import correct
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.counter import Counter
from csulora.tuning.examples import Examples
from csulora.tuning.frontier import Point, Rate, Refusals
from csulora.tuning.language_model import agreeing
from csulora.tuning.probes import is_refusal
from csulora.tuning.replies import Reply
from csulora.tuning.splits import selected, validation_of
from csulora.tuning.stages import Stages

Counts = dict[str, float]
"""How many replies stay, by what is counted, and the relative change."""


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

    def point(self, family: str, name: str, control: bool, uses: Sequence[Use]) -> Point:
        """Return a policy's point, or that of one for each adapter, over all adapters' validation prompts."""
        results = []
        for use in uses:
            results.append(self.stages.finish(f"measure {name} on {use.number}", partial(self._measure, use)))
            self.counter.tick(name)
        validation = [validation_of(self.examples.replies[use.number]) for use in uses]
        safety_count = sum(len(replies.safety) for replies in validation)
        task_count = sum(len(replies.task) for replies in validation)
        general = len(uses) * len(selected(self.request.general, validation=True))

        def rate(what: str, count: int) -> Rate:
            return Rate.of(sum(result[what] for result in results), count)

        return Point(
            family,
            name,
            control,
            safety=rate("safety", safety_count),
            task=rate("task", task_count),
            relative_change=math.sqrt(sum(result["relative_change"] ** 2 for result in results) / len(results)),
            refusals=Refusals(rate("refused", safety_count), rate("over-refused", task_count))
            if self.request.refusals
            else None,
            general=rate("general", general) if general else None,
        )

    def _measure(self, use: Use) -> Counts:
        """Replies that stay on an adapter's validation prompts, and |X - dW| / |dW|."""
        fixed, report = correct(self.request.adapters[use.number], use.subspace, use.policy)
        language_model = self.examples.language_model
        validation = validation_of(self.examples.replies[use.number])
        general_of_aligned = selected(self.examples.general, validation=True)
        found: Counts = {"relative_change": report.totals.relative_change}
        with self.examples.adapted(fixed):
            for kept, refused, replies in (
                ("safety", "refused", validation.safety),
                ("task", "over-refused", validation.task),
            ):
                found[kept] = sum(agreeing(language_model, replies))
                if self.request.refusals:
                    found[refused] = sum(map(self._is_refusal, language_model.answers(replies)))
            found["general"] = sum(self._are_answered(validation.general, general_of_aligned))
        return found

    def _are_answered(self, own: Sequence[Reply], aligned: Sequence[Reply]) -> list[bool]:
        """Whether the model, as it now stands, answers general prompts, which have these replies of both models.

        See `Point.general`.
        """
        language_model = self.examples.language_model
        if self.request.refusals:
            return [not self._is_refusal(answer) for answer in language_model.answers(own)]
        return list(map(max, agreeing(language_model, own), agreeing(language_model, aligned)))

    def _is_refusal(self, answer: str) -> bool:
        return is_refusal(answer, self.request.refusals)
