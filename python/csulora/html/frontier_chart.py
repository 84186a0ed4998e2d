"""What `csulora tune` measured, as a drawing: task kept against alignment kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from csulora.frontier import Frontier, Point
from csulora.html.charts import Axis, Frame, Tick

_FRAME = Frame(width=400, height=340, left=56, right=380, top=14, bottom=296)
_SHARES = (0, 0.2, 0.4, 0.6, 0.8, 1)


Role = Literal["recommended", "written", "candidate", "control"]


@dataclass(frozen=True)
class Mark:
    """A policy's place in the drawing, the ends of its intervals, and its number in the table."""

    number: int
    point: Point
    role: Role
    x: float
    y: float
    x_interval: tuple[float, float]
    y_interval: tuple[float, float]


@dataclass(frozen=True)
class FrontierChart:
    """The policies, the best first."""

    adapters: tuple[str, ...]
    verdict: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    frame: Frame = _FRAME

    @classmethod
    def of(cls, frontier: Frontier) -> Self:
        """Draw a frontier."""
        x, y = Axis(0, 1, _FRAME.left, _FRAME.right), Axis(0, 1, _FRAME.bottom, _FRAME.top)
        marks = []
        for number, point in enumerate(sorted(frontier.points, key=lambda point: -point.score), 1):
            marks.append(
                Mark(
                    number,
                    point,
                    _role(point, frontier),
                    x.at(point.keep.value),
                    y.at(point.guard.value),
                    (x.at(point.keep.low), x.at(point.keep.high)),
                    (y.at(point.guard.low), y.at(point.guard.high)),
                )
            )
        ticks = x.ticks(_SHARES, ".0%"), y.ticks(_SHARES, ".0%")
        return cls(frontier.adapters, frontier.verdict, tuple(marks), *ticks)


def _role(point: Point, frontier: Frontier) -> Role:
    if point.control:
        return "control"
    if point.policy == frontier.recommended:
        return "recommended"
    return "written" if point.policy == frontier.written else "candidate"
