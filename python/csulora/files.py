"""Files that appear complete or not at all, and documents that are read within bounds."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from csulora.errors import InputError


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_parent(path: Path) -> None:
    """Raise `InputError` unless ``path`` could be created: its directory exists and is writable."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent}: no such directory; create it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: not writable; choose another place for {path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, flushed to disk."""
    check_parent(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file")
    temporary = _temporary_beside(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
        _flush_to_disk(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yield an empty temporary directory that on success becomes ``path``.

    An existing ``path`` is replaced only if it is empty or holds the file ``marker``, which says that csulora
    wrote it.
    """
    check_parent(path)
    if path.exists() and not _replaceable(path, marker):
        raise InputError(f"{path}: exists and was not written by csulora; remove it or choose another name")
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(temporary)
        if path.exists():
            # A directory cannot be renamed over another: for a moment there is none.
            path.rename(temporary.with_suffix(".old"))
        temporary.rename(path)
        _flush_to_disk(path.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)


def _replaceable(path: Path, marker: str) -> bool:
    return path.is_dir() and not path.is_symlink() and ((path / marker).is_file() or not any(path.iterdir()))


def _temporary_beside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a FIFO or a device is never waited for.

    Raises:
        InputError: ``path`` is missing, is something else, or is larger than ``limit`` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if limit is not None and status.st_size > limit:
            raise InputError(f"{path}: has {status.st_size} bytes; at most {limit} are read")
        yield file


def read_regular(path: Path, limit: int) -> bytes:
    """Read a whole file as `open_regular` opens it; bytes added meanwhile are left out."""
    with open_regular(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Read a JSON object strictly: no key twice, no NaN or infinity.

    Raises:
        InputError: ``data``, which ``path`` holds, is anything else.
    """
    try:
        document = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(document: Any) -> str:
    """Return deterministic JSON: sorted keys, two spaces, a newline at the end."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
