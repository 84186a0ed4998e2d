"""A plan of the directory guard at a terminal: a row per upload, and below why some would not be let through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from csulora.serving.guard.plan import Planned


def plan_table(planned: Sequence[Planned]) -> RenderableType:
    """Return one row per upload: verdict and figures in OUTGOING now, and as they would be."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("adapter", overflow="fold")
    for column in ("verdict", "largest undo", "left now", "left then", "change now", "change then"):
        table.add_column(column)
    for row in planned:
        table.add_row(
            row.name,
            _arrow(row.verdict_now or "nothing", row.verdict),
            _undo(row.undo),
            _undo(row.undo_now),
            _undo(row.undo_after),
            _share(row.relative_change_now),
            _share(row.relative_change),
        )
    return Group(table, *(Text(f"{row.name}: {row.reason_code}: {row.reason}") for row in planned if row.reason))


def _arrow(now: str, then: str) -> str:
    return then if now == then else f"{now} -> {then}"


def _undo(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
