"""What is measured of every module, as coloured tables: one row per layer, one column per kind of module.

Experts, of which there are thousands, have grids of their own: `csulora.views.html.expert_maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from csulora.correction.canary_undo import CanaryUndo
from csulora.correction.report import COMPONENTS, ModuleReport, Report
from csulora.models.names import parse_expert
from csulora.views.html.numbers import percent, short_undo, undo

Tone = Literal["energy", "signed", "relative-change", "gain"]

_UNDO = "Share of the module's alignment that the update cancels. At +1 it is gone; a negative share reinforces it."
_UNDO_AFTER = "The same of the corrected update, in the colours of the map before."
_CANARY = "How far the update goes from the aligned model to a briefly un-aligned copy: +1 is as far as the copy."
_ENERGY = "Where the update lies, in percent: the components of a module's update add up to 100."
_GAINS = "What the policy multiplies each component by, in percent: 100 keeps it, 0 removes it, more reinforces it."
_RELATIVE_CHANGE = "Size of what the policy changes, relative to the update: |X - dW| / |dW|."
_ALIGNED = "Inside the subspace in which alignment moved the weights, on both sides."


@dataclass(frozen=True)
class HeatMap:
    """One figure of every measured module.

    Attributes:
        title: name of the figure.
        sentence: what it means.
        tone: which colours the table has; ``signed`` has one for each side of 0.
        limit: the share that has the full colour.
        decimals: digits of a percentage after the point; undo is no percentage, see `csulora.views.html.numbers`.
        values: the figure of each module, as a share.
    """

    title: str
    sentence: str
    tone: Tone
    limit: float
    decimals: int
    values: dict[str, float]

    @property
    def low(self) -> float:
        """The share at the other end of the colours."""
        return -self.limit if self.tone == "signed" else 0.0

    def legend(self, share: float) -> str:
        """An end of the colours as a text."""
        return short_undo(share) if self.tone == "signed" else percent(share, self.decimals)

    def cell(self, module: str) -> str:
        """A module's figure, short and without a sign of percent."""
        return self.legend(self.values[module]).removesuffix(" %")

    def exact(self, module: str) -> str:
        """A module's figure with one digit more."""
        share = self.values[module]
        return undo(share) if self.tone == "signed" else percent(share, self.decimals + 1)

    def depth(self, module: str) -> float:
        """How much of the full colour a module has, in [0, 1]."""
        return min(abs(self.values[module]) / self.limit, 1.0)


@dataclass(frozen=True)
class Group:
    """Heat maps that belong together."""

    title: str
    sentence: str
    maps: tuple[HeatMap, ...]


def heat_maps(report: Report, canary: CanaryUndo | None = None) -> tuple[Group, ...]:
    """Return the maps of a report's modules that are no experts, and of their undo of a canary.

    Where nothing was changed there are none of the change; where all modules are experts there are none.
    """
    modules = [module for module in report.measured if parse_expert(module.module) is None]
    if not modules:
        return ()
    before = _map("Undo", _UNDO, "signed", modules, lambda module: module.undo or 0.0)
    after = _map("Undo after", _UNDO_AFTER, "signed", modules, lambda module: module.undo_after or 0.0, before.limit)
    canaries = _canary_maps(modules, canary, not report.changes_nothing) if canary else ()
    relative_change = _map(
        "Relative change", _RELATIVE_CHANGE, "relative-change", modules, lambda module: module.relative_change or 0.0
    )
    energy = Group("Energy", _ENERGY, _energies(modules))
    if report.changes_nothing:
        return energy, Group("Undo", "What the update does to the alignment.", (before, *canaries))
    return (
        energy,
        Group(
            "Undo and relative change",
            "What the update does to the alignment, and the policy to the update. Relative change is in percent.",
            (before, after, *canaries, relative_change),
        ),
        Group("Gains", _GAINS, _gains(modules)),
    )


def _canary_maps(modules: Sequence[ModuleReport], canary: CanaryUndo, is_changed: bool) -> tuple[HeatMap, ...]:
    """One map of the undo of the canary, and where something was changed one of the undo after."""

    def values(undo: Mapping[str, float]) -> dict[str, float]:
        return {module.module: undo.get(module.module, 0.0) for module in modules}

    before = heat_map("Undo of the canary", _CANARY, "signed", values(canary.undo))
    if not is_changed:
        return (before,)
    after = heat_map("Undo of the canary after", _UNDO_AFTER, "signed", values(canary.undo_after), before.limit)
    return before, after


def _energies(modules: Sequence[ModuleReport]) -> tuple[HeatMap, ...]:
    return (
        _energy("Aligned", _ALIGNED, modules, "aligned"),
        _energy("Partial", "Inside it on one side, left or right.", modules, "left", "right"),
        _energy("Off", "Outside it on both sides.", modules, "off"),
    )


def _energy(title: str, sentence: str, modules: Sequence[ModuleReport], *components: str) -> HeatMap:
    return _map(
        title,
        sentence,
        "energy",
        modules,
        lambda module: sum((module.energies or {})[component] for component in components),
    )


def _gains(modules: Sequence[ModuleReport]) -> tuple[HeatMap, ...]:
    """One map per component; left and right share one where every module treats them alike."""
    gains = [module.gains or {} for module in modules]
    if all(gain["left"] == gain["right"] for gain in gains):
        components = {"Aligned": "aligned", "Partial": "left", "Off": "off"}
    else:
        components = {component.capitalize(): component for component in COMPONENTS}
    return tuple(
        _map(title, f"Gain of the {title.lower()} component.", "gain", modules, _gain(component), limit=1.0)
        for title, component in components.items()
    )


def _gain(component: str) -> Callable[[ModuleReport], float]:
    return lambda module: (module.gains or {})[component]


def _map(
    title: str,
    sentence: str,
    tone: Tone,
    modules: Sequence[ModuleReport],
    value: Callable[[ModuleReport], float],
    limit: float | None = None,
) -> HeatMap:
    return heat_map(title, sentence, tone, {module.module: value(module) for module in modules}, limit)


def heat_map(title: str, sentence: str, tone: Tone, values: dict[str, float], limit: float | None = None) -> HeatMap:
    """Return the map of some figures, whose largest has the full colour unless ``limit`` is given."""
    largest = max(map(abs, values.values()), default=0.0)
    return HeatMap(title, sentence, tone, limit or max(largest, 1e-3), 0 if largest >= 0.1 else 1, values)
