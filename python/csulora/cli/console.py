"""What the commands print: tables and documents on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from csulora.io.files import to_json, write_text

if TYPE_CHECKING:
    from csulora.extraction.model_pair import Progress as ReportProgress

STDOUT = Path("-")
_PIPE_WIDTH = 1000


def deliver(table: RenderableType, summary: str, document: dict[str, Any], json: Path | None, quiet: bool) -> None:
    """Print table and summary, unless nobody wants them, and write the document where somebody does."""
    if json and json != STDOUT:
        write_text(json, to_json(document))  # first: nobody may be reading what is printed
    if sys.stdout is None:  # closed by whoever started this
        return
    if json == STDOUT:
        print(to_json(document), end="")
    elif not quiet:
        # A pipe has no width of its own; wide enough that no table wraps.
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, emoji=False).print(table)
        print(summary)


@contextmanager
def progress_bar(verb: str, quiet: bool, lines: bool = False) -> Iterator[ReportProgress | None]:
    """Yield a callback that draws a progress bar on stderr, or None where nobody would see it.

    Where stderr is no terminal, and ``lines`` are wanted, the callback writes a line for each thing that begins.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        yield _lines(verb) if lines and not quiet else None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None)

        def report(module: str, done: int, total: int) -> None:
            bar.update(task, description=f"{verb} {module}", completed=done, total=total, refresh=True)

        yield report


def note(quiet: bool, text: str) -> None:
    """Tell the user something on stderr; a progress bar makes room for it."""
    if not quiet and sys.stderr is not None:
        print(f"csulora: {text}", file=sys.stderr, flush=True)


def _lines(verb: str) -> ReportProgress:
    last = ""

    def report(module: str, done: int, total: int) -> None:
        nonlocal last
        if module and module != last:
            print(f"csulora: {done / total:4.0%} {verb}: {module}", file=sys.stderr, flush=True)
        last = module

    return report
