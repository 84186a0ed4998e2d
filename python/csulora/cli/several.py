"""Several adapters in one call: read, hashed, corrected and written side by side, each on its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from csulora.cli import exit_codes
from csulora.cli.console import STDOUT, progress_bar
from csulora.errors import CsuloraError, RefusedError, printable
from csulora.io.files import is_gguf_name, make_directory, real_path, to_json, write_text

if TYPE_CHECKING:
    from csulora.correction.report import Report

Work = Callable[[str, Path], "tuple[Report, str]"]


def outputs(adapters: Sequence[str], directory: Path, json: Path | None) -> dict[str, Path]:
    """Return where each adapter is written: below the directory, under its own name.

    Raises:
        typer.BadParameter: two have one name, or the directory is a file or is to be the file ``json``.
    """
    if json and json != STDOUT and real_path(json) == real_path(directory):
        raise typer.BadParameter(f"{json} is the directory that adapters are written to; name another file for --json")
    if directory.is_file() or is_gguf_name(directory):
        raise typer.BadParameter(f"several adapters need a directory to be written to, and {directory} is a file")
    found: dict[Path, str] = {}
    for adapter in adapters:
        path = directory / Path(os.path.abspath(adapter)).name  # of a/.. the name of what it is
        if path in found:
            raise typer.BadParameter(f"{found[path]} and {adapter} would both be written to {path}; rename one")
        found[path] = adapter
    return {adapter: path for path, adapter in found.items()}


def _outcomes(targets: Mapping[str, Path], work: Work) -> Iterator[tuple[str, Future[tuple[Report, str]]]]:
    """Yield adapters as they are done. No more are in memory at a time than there are threads, and one that is done."""
    threads = len(os.sched_getaffinity(0))
    waiting = iter(targets.items())
    with ThreadPoolExecutor(threads) as pool:
        running: dict[Future[tuple[Report, str]], str] = {}
        while True:
            while len(running) < threads and (following := next(waiting, None)):
                running[pool.submit(work, *following)] = following[0]
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done


def tell_failure(adapter: str, error: CsuloraError | OSError) -> tuple[dict[str, Any], int]:
    """Say on stderr why an adapter failed; return its entry in the document, and the exit code that it asks for."""
    is_refused = isinstance(error, RefusedError)
    kind = "refused" if is_refused else "error"
    where, why = printable(adapter), printable(error).removeprefix(f"{printable(adapter)}: ")
    print(f"csulora: {kind}: {where}: {why}", file=sys.stderr)
    return {kind: printable(error)}, exit_codes.REFUSED if is_refused else exit_codes.BAD_INPUT


def correct_several(targets: Mapping[str, Path], work: Work, json: Path | None, quiet: bool) -> None:
    """Correct each adapter, and say in a line what became of it. One that fails stops no other.

    Args:
        targets: where each adapter is written.
        work: corrects and writes one; returns the report and the sha256 of what was written.
        json: file for a document with the totals, or the error, of each adapter.
        quiet: print errors alone.

    Raises:
        typer.Exit: an adapter failed: with `exit_codes.REFUSED` if all that did were refused.
    """
    make_directory(next(iter(targets.values())).parent)
    entries: dict[str, dict[str, Any]] = {}  # only if somebody will read them: memory must not grow with the adapters
    codes: set[int] = set()
    with progress_bar("correcting", quiet) as report_progress:
        for count, (adapter, done) in enumerate(_outcomes(targets, work), start=1):
            try:
                report, sha256 = done.result()
            except (CsuloraError, OSError) as error:
                entry, code = tell_failure(adapter, error)
                codes.add(code)
            else:
                entry = {"output": str(targets[adapter]), "sha256": sha256, "totals": asdict(report.totals)}
                if not quiet and json != STDOUT:
                    modules = f"{len(report.measured)} of {len(report.modules)} modules"
                    print(f"wrote {targets[adapter]}: {modules}, sha256 {sha256}")
            if json:
                entries[adapter] = entry
            if report_progress:
                report_progress(Path(adapter).name, count, len(targets))
    if json:
        document = to_json({"adapters": {adapter: entries[adapter] for adapter in targets}})
        if json == STDOUT:
            print(document, end="")
        else:
            write_text(json, document)
    if codes:
        raise typer.Exit(max(codes))
