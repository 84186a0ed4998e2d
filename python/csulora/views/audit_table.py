"""An audit at a terminal of 80 columns: a row per statement, and in full what does not hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from csulora.errors import printable
from csulora.policy.toml import one_line

if TYPE_CHECKING:
    from csulora.correction.audit import Check

_SHA256 = re.compile("[0-9a-f]{64}")
_DIGITS = 12  # of a hash that is as stated


def audit_table(checks: Sequence[Check]) -> RenderableType:
    """Return one row per statement of a report, and below them both sides of each that does not hold."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("what")
    table.add_column("holds")
    table.add_column("as found", overflow="fold")
    for check in checks:
        value = check.found if check.stated is None or not check.holds else check.stated
        table.add_row(check.what, "yes" if check.holds else "NO", _short(value))
    failed = [check for check in checks if not check.holds and check.stated is not None]
    return Group(table, *(line for check in failed for line in _sides(check)))


def _sides(check: Check) -> Iterable[Text]:
    yield Text(f"\n{check.what} does not hold:")
    for side in ("stated", "found"):
        yield Text(f"  {side:6} {_line(getattr(check, side))}")
    if isinstance(check.stated, dict) and isinstance(check.found, dict):
        stated, found = check.stated, check.found
        fields = (field for field in stated | found if stated.get(field) != found.get(field))
        yield Text(f"  differ in {', '.join(fields)}")


def _short(value: str | dict[str, Any]) -> Text:
    line = _line(value)
    return Text(line[:_DIGITS] if _SHA256.fullmatch(line) else line)


def _line(value: str | dict[str, Any]) -> str:
    return printable(one_line(value) if isinstance(value, dict) else value)
