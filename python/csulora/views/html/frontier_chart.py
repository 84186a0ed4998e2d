"""What `csulora tune` measured, as a drawing: task kept against alignment kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from csulora.tuning.frontier import Frontier, Point
from csulora.views.html.charts import Axis, Frame, Tick

_FRAME = Frame(width=400, height=340, left=56, right=380, top=14, bottom=296)
_SHARES = (0, 0.2, 0.4, 0.6, 0.8, 1)
_LABEL_SIZE = 14  # pixels; marks that are nearer to one another share a label
_MOST_NUMBERS = 3  # in a label

Role = Literal["recommended", "written", "candidate", "control"]


@dataclass(frozen=True)
class Mark:
    """A policy's place in the drawing, the ends of its intervals, and its number in the table.

    ``label`` holds the numbers of all marks that are too near to be labelled one by one; only the first has it.
    """

    number: int
    point: Point
    role: Role
    x: float
    y: float
    x_interval: tuple[float, float]
    y_interval: tuple[float, float]
    label: str = ""

    @property
    def leans_left(self) -> bool:
        """Whether the label stands to the left, where there is more room."""
        return self.x > (_FRAME.left + _FRAME.right) / 2

    def is_near(self, other: Mark) -> bool:
        """Whether their labels would overlap."""
        return abs(self.x - other.x) < _LABEL_SIZE and abs(self.y - other.y) < _LABEL_SIZE


@dataclass(frozen=True)
class FrontierChart:
    """The policies, the best first."""

    adapters: tuple[str, ...]
    verdict: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    counts_refusals: bool
    has_general: bool
    frame: Frame = _FRAME

    @classmethod
    def of(cls, frontier: Frontier) -> Self:
        """Draw a frontier."""
        x, y = Axis(0, 1, _FRAME.left, _FRAME.right), Axis(0, 1, _FRAME.bottom, _FRAME.top)
        marks = []
        for number, point in enumerate(sorted(frontier.points, key=lambda point: -point.choice.value), 1):
            marks.append(
                Mark(
                    number,
                    point,
                    _role(point, frontier),
                    x.at(point.task.value),
                    y.at(point.safety.value),
                    (x.at(point.task.low), x.at(point.task.high)),
                    (y.at(point.safety.low), y.at(point.safety.high)),
                )
            )
        ticks = x.ticks(_SHARES, ".0%"), y.ticks(_SHARES, ".0%")
        columns = frontier.counts_refusals, frontier.has_general
        return cls(frontier.adapters, frontier.verdict, _labelled(marks), *ticks, *columns)


def _labelled(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Give every group of marks that lie together one label."""
    groups: list[list[Mark]] = []
    for mark in marks:
        near = next((group for group in groups if group[0].is_near(mark)), None)
        if near is None:
            groups.append([mark])
        else:
            near.append(mark)
    labels = {group[0].number: _label([mark.number for mark in group]) for group in groups}
    return tuple(replace(mark, label=labels.get(mark.number, "")) for mark in marks)


def _label(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_MOST_NUMBERS])) + (
        " \N{HORIZONTAL ELLIPSIS}" if numbers[_MOST_NUMBERS:] else ""
    )


def _role(point: Point, frontier: Frontier) -> Role:
    if point.control:
        return "control"
    if point.policy == frontier.recommended:
        return "recommended"
    return "written" if point.policy == frontier.written else "candidate"
