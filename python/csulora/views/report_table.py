"""A correction's report at a terminal of 80 columns: a row per kind of module, or per module, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from csulora.correction.canary_undo import CanaryUndo
from csulora.correction.reference import FIGURES, Reference
from csulora.correction.report import ModuleReport, Report, Totals
from csulora.errors import printable
from csulora.models.names import parse_expert
from csulora.views.layout import Layout, by_number, columns, kind_of
from csulora.views.tables import span

_LONGEST_NAME = 200  # characters
_SHOWN_AS_NOTHING = 5e-4  # shares below it would be shown as 0.0 %
_COLOURS = {"nothing": "green", "some": "yellow", "all": "red", "little": "default"}
_READING = (
    "undo: share of the alignment that the update cancels. total: of all modules together. largest: of one module. "
    "On SmolLM2-135M an attacked adapter had total -0.009 and largest +0.546, a harmless one -0.024 and +0.365: "
    "neither figure decides alone."
)


def report_table(report: Report, every_module: bool = False, canary: CanaryUndo | None = None) -> RenderableType:
    """Return the table and the sentences below it.

    Without a policy that changes something there are no columns for what was changed. Where experts are among the
    modules, ``n`` says how many modules a row stands for.

    Args:
        report: what `csulora.correct` returned.
        every_module: a row per module, in natural order, in place of one per kind.
        canary: its undo, which gets a column.
    """
    is_changed = not report.changes_nothing
    rows = _module_rows(report) if every_module else _kind_rows(report)
    figures = _MODULE_FIGURES if every_module else _KIND_FIGURES
    if canary is not None:
        figures = figures | {"canary\nundo": partial(_undo_of, canary)}
    figures = figures | (_CHANGE if is_changed else {})
    counted = not every_module and any(parse_expert(module.module) for module in report.measured)
    figures = (_COUNT if counted else {}) | figures
    padding = 0 if counted or (canary is not None and is_changed) else 1  # in 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("module" if every_module else "kind", overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right")
    for name, modules in rows:
        totals = Totals.of(modules)
        table.add_row(Text(printable(name, _LONGEST_NAME)), *(figure(modules, totals) for figure in figures.values()))
    for status in ("kept", "dropped"):
        for module in (module for module in report.modules if module.status == status and every_module):
            table.add_row(Text(printable(module.module, _LONGEST_NAME)), status)
    if not every_module:
        table.add_section()
        table.add_row("all", *(figure(report.measured, report.totals) for figure in figures.values()))
    return Group(table, *_sentences(report, is_changed, canary))


def _sentences(report: Report, is_changed: bool, canary: CanaryUndo | None) -> Iterable[Text]:
    yield Text()
    if report.warning:
        yield Text(report.warning.removesuffix("; "), style="red")
    if is_changed:
        yield Text(report.verdict.text, style=_COLOURS[report.verdict.leaves])
    if canary is not None:
        yield Text(_canary_sentence(canary, is_changed))
    yield Text(annihilation_sentence(report))
    if report.totals.truncation_error >= _SHOWN_AS_NOTHING:
        yield Text(f"keeping the rank loses {report.totals.truncation_error:.1%} of the corrected update's energy")
    yield Text(_READING, style="dim")


def _canary_sentence(canary: CanaryUndo, is_changed: bool) -> str:
    after = f" -> {canary.total_after():+.3f} after the correction" if is_changed else ""
    return f"undo of the canary: {canary.total():+.3f}{after} (1: as far as the un-aligned copy)"


def _undo_of(canary: CanaryUndo, modules: Sequence[ModuleReport], _: Totals) -> str:
    return f"{canary.total(module.module for module in modules):+.3f}"


def annihilation_sentence(report: Report) -> str:
    """Say what the update removes of what the aligned matrices write, or that nobody looked."""
    totals, worst = report.totals, report.worst_annihilation
    if not report.knows_annihilation:
        return "annihilation ratio: absent, since it needs the aligned checkpoint (--aligned-model), or sketches of it"
    if worst is None:
        return "annihilation ratio: absent, since no sketch is large enough for the update's rank"
    after = totals.annihilation_ratio_after
    changed = "" if report.changes_nothing or after is None else f" -> {after:.2g} after the correction"
    where = printable(worst.module, _LONGEST_NAME)
    sentence = (
        f"annihilation ratio: {totals.annihilation_ratio:.2g} in {where}{changed} (near 0: a direction is removed)"
    )
    if totals.annihilation_interval is not None:
        low, high = totals.annihilation_interval
        sentence += f"; estimated, 99.9 % interval {low:.2g} to {high:.2g}"
    if report.annihilation_unknown:
        sentence += (
            f"; unknown for {len(report.annihilation_unknown)} modules, whose rank is too large for the sketches"
        )
    return sentence


def reference_sentences(reference: Reference, report: Report) -> list[str]:
    """Say where an adapter's figures stand among those of adapters that are trusted, and which were skipped."""
    count = len(reference.others(report))
    found = [f"skipped {printable(name)}: {printable(reason)}" for name, reason in reference.skipped.items()]
    for standing in reference.standings(report):
        found.append(
            f"{FIGURES[standing.figure]} {standing.value:.3g}: above {standing.percentile:.0f} % of {count} "
            "reference adapters"
        )
    return found


def _kind_rows(report: Report) -> list[tuple[str, list[ModuleReport]]]:
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.measured:
        kinds.setdefault(kind_of(module.module), []).append(module)
    ordered = sorted(kinds, key=by_number)
    return [(column.short, kinds[column.kind]) for column in columns(ordered)]


def _module_rows(report: Report) -> list[tuple[str, list[ModuleReport]]]:
    """Modules by layer and kind; ``24 v_proj`` where that names one of them only."""
    modules = {module.module: module for module in report.measured}
    layout = Layout.of(modules)
    return [
        (f"{row.label} {column.short}" if layout.one_stack and row.label.isdecimal() else name, [modules[name]])
        for row in layout.rows
        for column, name in zip(layout.columns, row.modules, strict=True)
        if name is not None
    ]


Figure = Callable[[list[ModuleReport], Totals], str]


def _ranks(modules: list[ModuleReport]) -> str:
    before, after = {module.rank for module in modules}, {module.rank_after for module in modules}
    return span(before) if before == after else f"{span(before)}->{span(after)}"


_COUNT: dict[str, Figure] = {"n": lambda modules, _: str(len(modules))}
_ENERGIES: dict[str, Figure] = {
    "rank": lambda modules, _: _ranks(modules),
    "aligned": lambda _, totals: f"{totals.energies['aligned']:.1%}",
    "partial": lambda _, totals: f"{totals.energies['left'] + totals.energies['right']:.1%}",
    "off": lambda _, totals: f"{totals.energies['off']:.1%}",
}
_MODULE_FIGURES: dict[str, Figure] = _ENERGIES | {"undo": lambda _, totals: f"{totals.undo:+.3f}"}
_KIND_FIGURES: dict[str, Figure] = _ENERGIES | {
    "total\nundo": lambda _, totals: f"{totals.undo:+.3f}",
    "largest\nundo": lambda _, totals: f"{totals.largest_undo:+.3f}",
}
_CHANGE: dict[str, Figure] = {
    "largest\nafter": lambda _, totals: f"{totals.largest_undo_after:+.3f}",
    "change": lambda _, totals: f"{totals.relative_change:.1%}",
}
