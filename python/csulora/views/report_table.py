"""A correction's report at a terminal of 80 columns: a row per kind of module, or per module, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from csulora.correction.report import ModuleReport, Report, Totals
from csulora.errors import printable
from csulora.views.layout import by_number, columns, place

_LONGEST_NAME = 200  # characters
_COLOURS = {"nothing": "green", "some": "yellow", "all": "red", "little": "default"}
_READING = (
    "undo: share of the alignment that the update cancels. total: of all modules together. largest: of one module. "
    "On SmolLM2-135M an attacked adapter had total -0.009 and largest +0.546, a harmless one -0.024 and +0.365: "
    "neither figure decides alone."
)


def report_table(report: Report, every_module: bool = False) -> RenderableType:
    """Return the table and the sentences below it.

    Without a policy that changes something there are no columns for what was changed.

    Args:
        report: what `csulora.correct` returned.
        every_module: a row per module, in natural order, in place of one per kind.
    """
    is_changed = not report.changes_nothing
    rows = _module_rows(report) if every_module else _kind_rows(report)
    figures = (_MODULE_FIGURES if every_module else _KIND_FIGURES) | (_CHANGE if is_changed else {})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
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
    return Group(table, *_sentences(report, is_changed))


def _sentences(report: Report, is_changed: bool) -> Iterable[Text]:
    yield Text()
    if report.warning:
        yield Text(report.warning.removesuffix("; "), style="red")
    if is_changed:
        yield Text(report.verdict.text, style=_COLOURS[report.verdict.leaves])
    if report.totals.truncation_error:
        yield Text(f"cutting the rank gives up {report.totals.truncation_error:.1%} of |X|^2")
    yield Text(_READING, style="dim")


def _kind_rows(report: Report) -> list[tuple[str, list[ModuleReport]]]:
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.measured:
        kinds.setdefault(place(module.module)[1], []).append(module)
    ordered = sorted(kinds, key=by_number)
    return [(column.short, kinds[column.kind]) for column in columns(ordered)]


def _module_rows(report: Report) -> list[tuple[str, list[ModuleReport]]]:
    """Modules by layer and kind; ``24 v_proj`` where that names one of them only."""
    places = {module.module: place(module.module) for module in report.measured}
    shorts = {column.kind: column.short for column in columns(sorted({kind for _, kind in places.values()}))}
    one_stack = len({stack for (stack, number), _ in places.values() if number >= 0}) <= 1

    def label(module: str) -> str:
        (_, number), kind = places[module]
        return f"{number} {shorts[kind]}" if one_stack and number >= 0 else module

    ordered = sorted(report.measured, key=lambda m: (places[m.module][0], by_number(places[m.module][1])))
    return [(label(module.module), [module]) for module in ordered]


Figure = Callable[[list[ModuleReport], Totals], str]


def _ranks(modules: list[ModuleReport]) -> str:
    before, after = {module.rank for module in modules}, {module.rank_after for module in modules}
    return _span(before) if before == after else f"{_span(before)}->{_span(after)}"


def _span(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)}..{max(numbers)}"


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
