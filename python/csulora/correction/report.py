"""What a correction was made from, what it did, and what it leaves of the undo."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from csulora import __version__
from csulora.errors import InputError, printable
from csulora.native import _core

if TYPE_CHECKING:
    import pandas

    from csulora.adapters.expert_encoding import Layout

COMPONENTS = ("aligned", "left", "right", "off")
_LITTLE_UNDO = 0.01  # share of a module's alignment below which a verdict names no undo
_TOLERANCE = 0.05  # share of the undo that counts as none, or as no difference

Status = Literal["corrected", "kept", "dropped"]


@dataclass(frozen=True)
class ModuleReport:
    """What was measured on one module's update and what became of it.

    Attributes:
        module: the module's name in the host's model.
        status: ``corrected``, or for a module the subspace file does not cover ``kept`` or ``dropped``.
        rank: rank before; ``rank_after``: rank after.
        norm: |dW|_F, scale included; None for a module that was dropped.
        energies: |dW_c|^2 / |dW|^2 of the components aligned, left, right and off.
        gains: what each component was multiplied by; with gains of single directions, and where the policy is filtered,
            |X_c| / |dW_c|, which may exceed 1 where something is reinforced.
        undo: -<dW, U S V^T> / |S|^2, the share of the alignment inside the subspace that the update cancels; a negative
            one reinforces it.
        undo_after: the same of the corrected update.
        alignment_norm: |S|, the norm of the displacement inside the subspace.
        relative_change: |X - dW| / |dW|.
        truncation_error: share of |X|^2 given up to reach the rank.
        annihilation_ratio: min |u^T (W + dW)|^2 / |u^T W|^2 over the directions u that the update writes, for the
            aligned W; None where neither W nor a sketch of it was at hand. ``annihilation_ratio_after``: the same of
            the corrected update.
        annihilation_interval: where the ratio is an estimate from a sketch, the exact one lies between these two with
            99.9 % probability; else None.
    """

    module: str
    status: Status
    rank: int
    rank_after: int
    norm: float | None = None
    energies: dict[str, float] | None = None
    gains: dict[str, float] | None = None
    undo: float | None = None
    undo_after: float | None = None
    alignment_norm: float | None = None
    relative_change: float | None = None
    truncation_error: float | None = None
    annihilation_ratio: float | None = None
    annihilation_ratio_after: float | None = None
    annihilation_interval: tuple[float, float] | None = None

    @classmethod
    def corrected(cls, module: str, rank: int, alignment_norm: float, result: _core.Correction) -> Self:
        """Describe one corrected module."""
        energies, gains = result.energies, result.gains  # each time a copy of the core's
        return cls(
            module=module,
            status="corrected",
            rank=rank,
            rank_after=result.factors.a.shape[0],
            norm=result.norm,
            energies={component: getattr(energies, component) for component in COMPONENTS},
            gains={component: getattr(gains, component) for component in COMPONENTS},
            undo=result.undo,
            undo_after=result.undo_after,
            alignment_norm=alignment_norm,
            relative_change=result.relative_change,
            truncation_error=result.truncation_error,
        )

    @property
    def kept_share(self) -> float:
        """|X|^2 / |dW|^2: what the gains leave of the update, before its rank is cut."""
        energies, gains = self.energies or {}, self.gains or {}
        return sum(energies[component] * gains[component] ** 2 for component in energies)


@dataclass(frozen=True)
class Totals:
    """Figures of several modules together: their updates seen as one block-diagonal update.

    Attributes:
        uncorrected: share of |dW|^2 in modules that the subspace file does not cover and the policy keeps.
        norm: |dW|_F of the corrected modules.
        energies: share of |dW|^2 in each component.
        undo: share of all their alignment that the updates cancel; ``undo_after``: that the corrected ones cancel.
        largest_undo: of one module; ``largest_undo_after``: of one corrected module, which may be another.
        relative_change: |X - dW| / |dW|.
        truncation_error: share of |X|^2 given up to reach the rank.
        annihilation_ratio: the smallest of a module; ``annihilation_ratio_after``: of a corrected one. None: absent.
        annihilation_interval: of the former, where it is an estimate.
    """

    uncorrected: float
    norm: float
    energies: dict[str, float]
    undo: float
    undo_after: float
    largest_undo: float
    largest_undo_after: float
    relative_change: float
    truncation_error: float
    annihilation_ratio: float | None = None
    annihilation_ratio_after: float | None = None
    annihilation_interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, modules: Sequence[ModuleReport]) -> Self:
        """Sum up the modules, of which those that were dropped count for nothing."""
        measured = [module for module in modules if module.status == "corrected"]
        weights = [_value(module.norm) ** 2 for module in measured]
        remaining = [weight * module.kept_share for weight, module in zip(weights, measured, strict=True)]
        uncorrected = sum(_value(module.norm) ** 2 for module in modules if module.status == "kept")
        alignment = [_value(module.alignment_norm) ** 2 for module in measured]
        undo, undo_after = [_value(m.undo) for m in measured], [_value(m.undo_after) for m in measured]
        return cls(
            uncorrected=uncorrected / total if (total := uncorrected + sum(weights)) else 0.0,
            norm=math.sqrt(sum(weights)),
            energies={c: _mean([(module.energies or {})[c] for module in measured], weights) for c in COMPONENTS},
            undo=_mean(undo, alignment),
            undo_after=_mean(undo_after, alignment),
            largest_undo=max(undo, default=0.0),
            largest_undo_after=max(undo_after, default=0.0),
            relative_change=math.sqrt(_mean([_value(module.relative_change) ** 2 for module in measured], weights)),
            truncation_error=_mean([_value(module.truncation_error) for module in measured], remaining),
            annihilation_ratio=_smallest(module.annihilation_ratio for module in measured),
            annihilation_interval=_interval_of_smallest(measured),
            annihilation_ratio_after=_smallest(module.annihilation_ratio_after for module in measured),
        )


@dataclass(frozen=True)
class Verdict:
    """What a correction leaves of the undo.

    Attributes:
        leaves: ``nothing`` (at most 5 % of the largest undo is left), ``some``, ``all`` (95 % or more), or ``little``:
            no module undid 1 % of its alignment, before or after.
        text: the same as a sentence with its figures.
    """

    leaves: Literal["nothing", "some", "all", "little"]
    text: str

    @classmethod
    def of(cls, totals: Totals) -> Self:
        """Judge by the largest undo of a module, before and after; what else was changed does not count."""
        before, after = totals.largest_undo, totals.largest_undo_after
        figures = f"largest {before:+.3f} -> {after:+.3f}, total {totals.undo:+.3f} -> {totals.undo_after:+.3f}"
        if max(before, after) < _LITTLE_UNDO:
            return cls("little", f"no module undoes 1 % of its alignment ({figures})")
        if after >= (1 - _TOLERANCE) * before:
            verb = "adds to the largest undo" if after > (1 + _TOLERANCE) * before else "leaves all of the undo"
            return cls("all", f"the policy {verb} ({figures})")
        if after <= _TOLERANCE * before:
            return cls("nothing", f"the policy takes the undo away ({figures})")
        return cls("some", f"the policy leaves {after / before:.0%} of the largest undo ({figures})")


@dataclass(frozen=True)
class Report:
    """What a correction was made from and what it did. Holds nothing that varies between identical runs.

    ``copies`` are the modules whose base matrix the adapter held too: it is the aligned checkpoint's, and left out.
    ``host_notes`` say what a host would not apply as the adapter's file says, see `host_meaning`. ``layout`` is the one
    of experts that was asked for; None: as they came. ``knows_annihilation`` says whether the aligned weights, or
    sketches of them, were at hand, without which there are no annihilation ratios. ``annihilation_unknown`` are modules
    of too large a rank for the sketches.

    >>> policy = csulora.Policy.none()
    >>> _, report = csulora.correct(csulora.load_adapter(adapter), csulora.Subspace.open(subspace), policy)
    >>> report.changes_nothing, report.totals.undo == report.totals.undo_after
    (True, True)
    """

    adapter: str
    adapter_sha256: str
    subspace_sha256: str
    fingerprints: dict[str, str]
    policy: dict[str, Any]
    modules: tuple[ModuleReport, ...]
    copies: tuple[str, ...] = ()
    host_notes: tuple[str, ...] = ()
    layout: Layout | None = None
    knows_annihilation: bool = False
    annihilation_unknown: tuple[str, ...] = ()
    csulora: str = __version__

    @property
    def measured(self) -> list[ModuleReport]:
        """The modules that the subspace file covers."""
        return [module for module in self.modules if module.status == "corrected"]

    @property
    def kept(self) -> list[ModuleReport]:
        """The modules that the subspace file does not cover and that passed as they were."""
        return [module for module in self.modules if module.status == "kept"]

    @property
    def warning(self) -> str:
        """What passed uncorrected, as the beginning of a sentence about the rest; empty if nothing did."""
        if not self.kept:
            return ""
        count = f"{len(self.kept)} of {len(self.modules)} modules"
        return f"{self.totals.uncorrected:.1%} of |dW|^2 passes uncorrected, in {count}; "

    @property
    def worst_annihilation(self) -> ModuleReport | None:
        """The module with the smallest annihilation ratio; None where none is known."""
        known = [module for module in self.measured if module.annihilation_ratio is not None]
        return min(known, key=lambda module: _value(module.annihilation_ratio), default=None)

    @property
    def worst_undo(self) -> ModuleReport | None:
        """The module that undoes the largest share of its alignment."""
        return max(self.measured, key=lambda module: _value(module.undo), default=None)

    @cached_property
    def totals(self) -> Totals:
        """Figures of all modules together."""
        return Totals.of(self.modules)

    @property
    def verdict(self) -> Verdict:
        """What the correction leaves of the undo."""
        return Verdict.of(self.totals)

    @property
    def changes_nothing(self) -> bool:
        """Whether every module came out as it went in."""
        return all(module.status != "dropped" and not module.relative_change for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an infinite penalty is the text ``inf``."""
        document = asdict(self)
        document["totals"] = asdict(self.totals)
        document["verdict"] = asdict(self.verdict)
        finite: dict[str, Any] = spell_infinity(document)
        return finite

    def to_frame(self) -> pandas.DataFrame:
        """Return a pandas table: a row per module, a column per figure (``energy_aligned``, ``gain_off``, ...).

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_frame needs pandas, which is not installed: pip install pandas") from None
        return pandas.DataFrame([_flat(module) for module in self.modules])

    def __repr__(self) -> str:
        """The verdict, in one line."""
        return f"<Report of {self.adapter!r}: {len(self.measured)} of {len(self.modules)} modules; {self.verdict.text}>"

    def _repr_html_(self) -> str:
        """The totals, for a notebook."""
        totals = self.totals
        figures = {component: f"{totals.energies[component]:.1%}" for component in COMPONENTS} | {
            "total undo": f"{totals.undo:+.3f} &rarr; {totals.undo_after:+.3f}",
            "largest undo": f"{totals.largest_undo:+.3f} &rarr; {totals.largest_undo_after:+.3f}",
            "relative change": f"{totals.relative_change:.1%}",
        }
        head = "".join(f"<th>{name}</th>" for name in figures)
        row = "".join(f"<td>{figure}</td>" for figure in figures.values())
        caption = html.escape(printable(f"{self.adapter}: {self.warning}{self.verdict.text}"))
        return f"<table><caption>{caption}</caption><tr>{head}</tr><tr>{row}</tr></table>"


def _flat(module: ModuleReport) -> dict[str, Any]:
    row = asdict(module)
    for figure, singular in (("energies", "energy"), ("gains", "gain")):
        row |= {f"{singular}_{component}": (row[figure] or {}).get(component) for component in COMPONENTS}
        del row[figure]
    return row


def _value(number: float | None) -> float:
    return 0.0 if number is None else number


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def spell_infinity(document: Any) -> Any:
    """Return a document for JSON, which lacks infinity: the text ``inf`` stands for it."""
    if isinstance(document, dict):
        return {key: spell_infinity(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [spell_infinity(value) for value in document]
    return "inf" if document == math.inf else document


def _smallest(ratios: Iterable[float | None]) -> float | None:
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _interval_of_smallest(modules: Iterable[ModuleReport]) -> tuple[float, float] | None:
    """Of the smallest ratio of all modules: it is at least the least of their lower ends, and at most of the upper."""
    intervals = [module.annihilation_interval for module in modules if module.annihilation_interval is not None]
    return (min(low for low, _ in intervals), min(high for _, high in intervals)) if intervals else None
