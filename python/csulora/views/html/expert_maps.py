"""What is measured of every expert, as coloured grids: one row per layer, one column per expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from csulora.correction.report import ModuleReport, Report, Totals
from csulora.models.names import parse_expert
from csulora.views.html.charts import Tick
from csulora.views.html.heat_maps import HeatMap, heat_map
from csulora.views.layout import place

_HEIGHT = 12  # of a cell, in pixels
_WIDTHS = (7, 24)
_DRAWING = 900  # pixels, that cells fill if their width allows it
_TOP = 18
_APART = 28  # pixels between labels of columns

_UNDO = "The largest undo of the expert's projections, each as a share of its own alignment."
_UNDO_AFTER = "The same of the corrected update, in the colours of the map before."
_SHARE = "Energy: the expert's part of |dW|\N{SUPERSCRIPT TWO} of all experts, in percent."
_INSIDE = "Energy inside the subspace on one side or both: aligned and partial, as a part of the expert's own."


@dataclass(frozen=True)
class Line:
    """Experts of one layer: its label, its place from the top, and where each expert's cell is, by its name."""

    label: str
    top: int
    cells: tuple[tuple[str, int, int], ...]  # name, expert, place from the left


@dataclass(frozen=True)
class Grid:
    """Where the cells of all experts are, in pixels."""

    lines: tuple[Line, ...]
    ticks: tuple[Tick, ...]
    left: int
    cell_width: int
    cell_height: int
    width: int
    height: int

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Arrange experts by layer; a name ends in the expert's number."""
        found: dict[str, list[int]] = defaultdict(list)
        for name in names:
            owner, _, expert = name.rpartition(".")
            found[owner].append(int(expert))
        owners = sorted(found, key=lambda owner: (place(f"{owner}.0"), owner))
        layers = [str(place(f"{owner}.0")[0][1]) for owner in owners]
        labels = layers if len(set(layers)) == len(layers) else owners
        count = 1 + max(map(max, found.values()), default=0)
        width = min(max(_DRAWING // count, _WIDTHS[0]), _WIDTHS[1])
        left = 8 + 7 * max(map(len, labels), default=0)
        lines = [
            Line(
                label,
                _TOP + _HEIGHT * at,
                tuple((f"{owner}.{expert}", expert, left + width * expert) for expert in sorted(found[owner])),
            )
            for at, (owner, label) in enumerate(zip(owners, labels, strict=True))
        ]
        step = -(-_APART // width)
        ticks = [Tick(left + width * expert + width / 2, str(expert)) for expert in range(0, count, step)]
        right = left + width * count + 12
        return cls(tuple(lines), tuple(ticks), left, width, _HEIGHT, right, _TOP + _HEIGHT * len(lines) + 4)


@dataclass(frozen=True)
class ExpertMaps:
    """Maps of all experts in one grid."""

    grid: Grid
    maps: tuple[HeatMap, ...]

    @classmethod
    def of(cls, report: Report) -> Self | None:
        """Return the maps of a report; None if no expert was measured. There is none of a change if nothing changed."""
        found: dict[str, list[ModuleReport]] = defaultdict(list)
        for module in report.measured:
            if (parsed := parse_expert(module.module)) is not None:
                found[f"{parsed[0]}.{parsed[1]}"].append(module)
        if not found:
            return None
        totals = {name: Totals.of(projections) for name, projections in found.items()}
        before = heat_map("Undo", _UNDO, "signed", _each(totals, lambda of_expert: of_expert.largest_undo))
        maps = [before]
        if not report.changes_nothing:
            after = _each(totals, lambda of_expert: of_expert.largest_undo_after)
            maps.append(heat_map("Undo after", _UNDO_AFTER, "signed", after, before.limit))
        whole = sum(of_expert.norm**2 for of_expert in totals.values()) or 1.0
        share = _each(totals, lambda of_expert: of_expert.norm**2 / whole)
        inside = _each(totals, lambda of_expert: _sum(of_expert.energies, ("aligned", "left", "right")))
        maps += [
            heat_map("Share of the update", _SHARE, "energy", share),
            heat_map("Inside the subspace", _INSIDE, "energy", inside),
        ]
        return cls(Grid.of(found), tuple(maps))


def _each(totals: dict[str, Totals], value: Callable[[Totals], float]) -> dict[str, float]:
    return {name: value(of_expert) for name, of_expert in totals.items()}


def _sum(energies: dict[str, float], components: Sequence[str]) -> float:
    return sum(energies[component] for component in components)
