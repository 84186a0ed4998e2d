"""What `csulora evaluate` found of one adapter: counts, and replies side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from csulora.errors import InputError
from csulora.evaluation.evaluation import AdapterEvaluation, Evaluation, Row

_SHOWN = 20  # prompts of each kind


@dataclass(frozen=True)
class EvaluationSection:
    """One adapter's part of an evaluation.

    Attributes:
        found: the adapter's part.
        counts_refusals: whether refusals were counted.
        is_judged: whether a judge was asked.
        replies: kind of prompt -> positions of the prompts whose replies are shown.
    """

    found: AdapterEvaluation
    counts_refusals: bool
    is_judged: bool
    replies: dict[str, list[int]]

    @classmethod
    def of(cls, evaluation: Evaluation, adapter_sha256: str) -> Self:
        """Take the part about an adapter; raises `InputError` if there is none."""
        for found in evaluation.adapters:
            if found.sha256 == adapter_sha256:
                replies = {kind: _telling(found, kind) for kind in found.prompts}
                return cls(found, evaluation.counts_refusals, evaluation.is_judged, replies)
        names = ", ".join(each.adapter for each in evaluation.adapters)
        raise InputError(
            f"the evaluation is of {names}, whose content is another than this adapter's; evaluate this one"
        )

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return self.found.rows

    @property
    def answering(self) -> list[Row]:
        """The rows that have replies."""
        return [row for row in self.rows if row.refusal is None]

    @property
    def kinds(self) -> list[str]:
        """The kinds of prompt."""
        return list(self.found.prompts)

    @property
    def prompts(self) -> dict[str, tuple[tuple[dict[str, str], ...], ...]]:
        """Kind -> the prompts."""
        return self.found.prompts

    @property
    def scores(self) -> list[tuple[str, str]]:
        """Tasks and metrics of lm-eval."""
        return sorted({(task, metric) for row in self.rows for task, found in row.scores.items() for metric in found})

    @property
    def counts(self) -> str:
        """How many prompts there are of each kind."""
        return ", ".join(f"{len(chats)} {kind} prompts" for kind, chats in self.prompts.items())


def _telling(found: AdapterEvaluation, kind: str) -> list[int]:
    """Positions of the prompts to show: those first that most policies answer otherwise than they should."""
    policies = [row for row in found.rows if row.role == "policy" and row.refusal is None]
    positions = range(len(found.prompts[kind]))
    return sorted(positions, key=lambda at: sum(row.outcomes[kind][at].same for row in policies))[:_SHOWN]
