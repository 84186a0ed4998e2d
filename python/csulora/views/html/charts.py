"""What the page's drawings have in common: frames and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """A drawing's size, and the box within it that its axes span, in the drawing's units (y grows downwards)."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in the drawing's units."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Maps ``low``..``high`` to ``start``..``end`` in the drawing, by their logarithms if ``logarithmic``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return a value's place, rounded to what can be seen."""
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, values: Sequence[float], form: str = "g") -> tuple[Tick, ...]:
        """Label those of ``values`` that lie on the axis."""
        return tuple(Tick(self.at(value), f"{value:{form}}") for value in values if self.low <= value <= self.high)


def round_values(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within ``low``..``high``; powers alone where those are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 4 else (1,)
    return [factor * 10.0**exponent for exponent in exponents for factor in factors]
