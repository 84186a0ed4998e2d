"""Overrides: other numbers of a policy for some modules, and the checks of all its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from csulora.errors import InputError

if TYPE_CHECKING:
    from csulora.native import _core

PENALTIES = ("aligned", "partial", "off")
LARGEST = 1 << 53  # whole number; the next is no float64
_GAINS = ("aligned", "left", "right", "off")
_SIDES = ("left", "right")


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
        for name, value in _named(where, _GAINS, self.gains):
            _check_gain(f"{where}: gain {name}", value)
        for side in _SIDES if self.directions else ():
            for value in getattr(self.directions, side):
                _check_gain(f"{where}: a gain of directions {side}", value)
        for value in self.directions.reinforced if self.directions else ():
            check_number(f"{where}: a multiple of directions reinforced", value)
            if not math.isfinite(value):
                raise InputError(f"policy {where}: a multiple of directions reinforced is {value}; it must be finite")

    def attenuation(self) -> _core.Penalties | _core.Components | _core.Directions:
        """Return the numbers as the compiled core takes them."""
        from csulora.native import _core

        if self.gains is not None:
            return _core.Components(*self.gains)
        if self.penalties is not None:
            return _core.Penalties(*self.penalties)
        assert self.directions is not None
        return _core.Directions(self.directions.left, self.directions.right, self.directions.reinforced)


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


def override_document(override: Override) -> dict[str, Any]:
    """Return an override as its TOML table."""
    if override.gains is not None:
        return {"match": override.match, "gains": dict(zip(_GAINS, override.gains, strict=True))}
    if override.directions is not None:
        lists = {name: list(values) for name, values in asdict(override.directions).items()}
        if not lists["reinforced"]:
            del lists["reinforced"]
        return {"match": override.match, "directions": lists}
    assert override.penalties is not None
    return {"match": override.match, "penalties": dict(zip(PENALTIES, override.penalties, strict=True))}


def read_override(entry: Any) -> Override:
    """Read an override from its TOML table, or raise `InputError`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
        raise InputError("policy: every override must be a table with a `match`")
    unknown = set(entry) - {"match", "penalties", "gains", "directions"}
    if unknown:
        raise InputError(f"policy override {entry['match']!r}: unknown field {sorted(unknown)[0]!r}")
    values: dict[str, Any] = {}
    for kind, keys in (("penalties", PENALTIES), ("gains", _GAINS)):
        if kind in entry:
            table = entry[kind]
            if not isinstance(table, dict) or set(table) != set(keys):
                raise InputError(f"policy override {entry['match']!r}: {kind} must be a table of {', '.join(keys)}")
            values[kind] = tuple(table[key] for key in keys)
    if "directions" in entry:
        values["directions"] = _directions(entry["directions"], f"policy override {entry['match']!r}")
    return Override(entry["match"], **values)


def _directions(table: Any, where: str) -> Directions:
    is_table = isinstance(table, dict) and set(table) - {"reinforced"} == set(_SIDES)
    if not is_table or not all(isinstance(values, list) for values in table.values()):
        raise InputError(f"{where}: directions must be a table of the lists left and right, and perhaps reinforced")
    return Directions(**{name: tuple(values) for name, values in table.items()})
