"""Overrides: other numbers of a policy for some modules, and the checks of all its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csulora.errors import InputError

PENALTIES = ("aligned", "partial", "off")
LARGEST = 1 << 53  # whole number; the next is no float64
GAINS = ("aligned", "left", "right", "off")
SIDES = ("left", "right")


@dataclass(frozen=True)
class Directions:
    """What is kept along each leading singular direction, and how much of the displacement is added.

    X = (I - U (1 - left) U^T) dW (I - V (1 - right) V^T) + U (reinforced S) V^T

    Attributes:
        left: gains in [0, 1] of what is written along the first columns of u; along all others it is kept.
        right: of what is read along the first columns of v.
        reinforced: multiples of the displacement's first singular triples u s v^T that are added to every update but 0,
            whatever it is. Each that is not 0 adds 1 to the rank of X, and to the rank that ``keep`` keeps.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    reinforced: tuple[float, ...] = ()


@dataclass(frozen=True)
class Override:
    """Other numbers for the modules that a glob matches: exactly one of penalties, gains and directions.

    Attributes:
        match: glob over module names as the subspace file has them.
        penalties: aligned, partial, off; 0 or more, infinity allowed.
        gains: aligned, left, right, off; in [0, 1].
        directions: gains of single directions.

    >>> csulora.Override("*.mlp.*", gains=(0.0, 0.5, 0.5, 1.0)).gains
    (0.0, 0.5, 0.5, 1.0)
    """

    match: str
    penalties: tuple[float, float, float] | None = None
    gains: tuple[float, float, float, float] | None = None
    directions: Directions | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not isinstance(self.match, str):
            raise InputError(f"policy override: match is {self.match!r}; it must be a glob")
        where = f"override {self.match!r}"
        if [self.penalties, self.gains, self.directions].count(None) != 2:
            raise InputError(f"policy {where}: give either penalties, gains or directions")
        for name, value in _named(where, PENALTIES, self.penalties):
            check_penalty(f"{where}: {name}", value)
        for name, value in _named(where, GAINS, self.gains):
            _check_gain(f"{where}: gain {name}", value)
        for side in SIDES if self.directions else ():
            for value in getattr(self.directions, side):
                _check_gain(f"{where}: a gain of directions {side}", value)
        for value in self.directions.reinforced if self.directions else ():
            check_number(f"{where}: a multiple of directions reinforced", value)
            if not math.isfinite(value):
                raise InputError(f"policy {where}: a multiple of directions reinforced is {value}; it must be finite")

    def strengthened(self, strength: float) -> Override:
        """Return the override with ``strength`` times the multiples that it reinforces, if it does."""
        if self.directions is None:
            return self
        reinforced = tuple(strength * multiple for multiple in self.directions.reinforced)
        return replace(self, directions=replace(self.directions, reinforced=reinforced))


def _named(where: str, keys: Sequence[str], values: Sequence[float] | None) -> list[tuple[str, float]]:
    if values is not None and len(values) != len(keys):
        raise InputError(f"policy {where}: give exactly {', '.join(keys)}")
    return list(zip(keys, values or (), strict=False))


def check_number(name: str, value: object) -> None:
    """Raise `InputError` unless a field is a number that float64 holds."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not is_whole and not isinstance(value, float):
        raise InputError(f"policy {name} is {value!r}; it must be a number")


def _check_gain(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise InputError(f"policy {name} is {value}; it must lie in [0, 1]")


def check_penalty(name: str, value: float) -> None:
    """Raise `InputError` unless a field is a penalty: a number from 0 to infinity."""
    check_number(name, value)
    if not value >= 0:
        raise InputError(f"policy {name} is {value}; a penalty must be 0 or more")
