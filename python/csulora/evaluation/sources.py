"""Where prompts come from: text, JSON lines, columns of CSV and Parquet files, and data sets of the hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.io.files import read_regular
from csulora.tuning import probes
from csulora.tuning.probes import Chat, Message, from_text, from_turns

MOST = 100_000  # prompts of one kind
HUB = "hf:"
_LARGEST_FILE = 1 << 30  # bytes
_TABLES = (".csv", ".parquet")
_HUB_SOURCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w.-]+))?/([\w.-]+)#(.+)")

Prompts = str | Path | Sequence[str | Chat]
"""A source, or prompts themselves: texts of a user's turn, or chats."""


def chats_of(prompts: Prompts, fewest: int = 1) -> tuple[Chat, ...]:
    """Return prompts as chats; see `read` for sources, which hold ``fewest`` or more.

    >>> chats_of(["tell me a tale"])
    ((Message(role='user', content='tell me a tale'),),)
    """
    if isinstance(prompts, (str, Path)):
        return read(str(prompts), fewest)
    return _chats(prompts, "prompts")


def read(source: str, fewest: int = 1, most: int = MOST) -> tuple[Chat, ...]:
    """Read prompts.

    Args:
        source: one of

            - a file with a prompt per line, or with chats as JSON lines, see `csulora.tuning.probes.parse`,
            - ``FILE.csv#COLUMN`` or ``FILE.parquet#COLUMN``,
            - ``hf:ORG/NAME/SPLIT#COLUMN``, a data set of the hub; ``hf:ORG/NAME@REVISION/CONFIGURATION/SPLIT#COLUMN``
              says which revision and which configuration.

    A cell is a text, or a list of turns with ``role`` and ``content`` as a chat.

    Raises:
        InputError: there is no such source, it is malformed, a prompt is in it twice, or a package is missing.

    >>> _ = Path("prompts.csv").write_text("id,prompt\\n1,tell me a tale\\n")
    >>> read("prompts.csv#prompt")
    ((Message(role='user', content='tell me a tale'),),)
    """
    cells = column_of(source)
    if cells is None:
        return probes.read(source, fewest, most)
    chats = _chats(cells, source)
    if not fewest <= len(chats) <= most:
        raise InputError(f"{source}: holds {len(chats)} prompts; give {fewest} to {most}")
    return chats


def files_of(given: Iterable[str | None]) -> list[str]:
    """Return the files that sources read, without columns; data sets of the hub are none.

    >>> files_of(["a.txt", "b.csv#prompt", "hf:org/name/test#prompt", None])
    ['a.txt', 'b.csv']
    """
    return [_file_of(source) for source in given if source and not source.startswith(HUB)]


def _file_of(source: str) -> str:
    path, _, _ = source.rpartition("#")
    return path if Path(path).suffix in _TABLES else source


def column_of(source: str) -> list[Any] | None:
    """Return the cells of a table's column; None where the source is no table, but lines of a file.

    Raises:
        InputError: there is no such column or table, it is malformed, or a package is missing.
    """
    if source.startswith(HUB):
        return _hub_column(source)
    path, mark, column = source.rpartition("#")
    if mark and Path(path).suffix in _TABLES:
        return _column(Path(path), column)
    if Path(source).suffix in _TABLES:
        raise InputError(f"{source}: say which column is meant: {source}#COLUMN")
    if mark and Path(path).is_file() and not Path(source).exists():
        raise InputError(f"{source}: a column is of a file that ends with {' or '.join(_TABLES)}; leave #{column} out")
    return None


def _column(path: Path, column: str) -> list[Any]:
    if path.suffix == ".csv":
        return _csv_column(path, column)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    parquet = _package("pyarrow.parquet", f"{path}#{column}")
    try:
        columns = parquet.read_schema(path).names
    except Exception as error:  # pyarrow has many
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    _check_column(path, column, columns)
    try:
        found: list[Any] = parquet.read_table(path).column(column).to_pylist()
    except Exception as error:
        raise InputError(f"{path}: column {column!r} is not readable: {error}") from error
    return found


def _csv_column(path: Path, column: str) -> list[Any]:
    try:
        text = read_regular(path, _LARGEST_FILE).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _check_column(path, column, rows.fieldnames or ())
        return [row[column] for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from error


def _hub_column(source: str) -> list[Any]:
    found = _HUB_SOURCE.fullmatch(source)
    if found is None:
        raise InputError(f"{source}: not of the form hf:ORG/NAME/SPLIT#COLUMN")
    name, revision, configuration, split, column = found.groups()
    datasets = _package("datasets", source)
    try:
        rows = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except Exception as error:  # so many as there are loaders
        raise InputError(f"{source}: the data set cannot be loaded: {error}") from error
    _check_column(source, column, rows.column_names)
    return list(rows[column])


def _package(module: str, source: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f"{source}: needs {package}; pip install 'csulora[datasets]'") from error


def _check_column(where: object, column: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    if column not in columns:
        raise InputError(f"{where}: has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")
    if columns.count(column) > 1:
        raise InputError(f"{where}: has {columns.count(column)} columns {column!r}; rename all but one")


def _chats(cells: Iterable[Any], where: str) -> tuple[Chat, ...]:
    chats: dict[Chat, int] = {}
    for number, cell in enumerate(cells, 1):
        try:
            chat = _chat(cell)
        except ValueError as error:
            raise InputError(f"{where}: prompt {number}: {error}") from error
        if chat in chats:
            raise InputError(f"{where}: prompt {number}: the same as prompt {chats[chat]}; remove one of them")
        chats[chat] = number
    return tuple(chats)


def _chat(cell: Any) -> Chat:
    if isinstance(cell, (list, tuple)):
        return from_turns([asdict(turn) if isinstance(turn, Message) else turn for turn in cell])
    return from_text(cell)
