"""What a signed adapter was made of, at a terminal: a row per file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from csulora.errors import printable

if TYPE_CHECKING:
    from csulora.serving.provenance import Provenance


def provenance_table(provenance: Provenance) -> Table:
    """Return one row per file that was read or written, with its sha256 in full, as `sha256sum` gives it."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("file")
    table.add_column("sha256", no_wrap=True)
    for name, digest in provenance.ingredients.digests.items():
        table.add_row(f"made of {printable(name)}", printable(digest))
    for name, digest in provenance.outputs.items():
        table.add_row(f"written {printable(name)}", printable(digest))
    return table
