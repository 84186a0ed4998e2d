"""What lies in INCOMING: which entries are uploads, whether one has changed, and what identifies its content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from csulora.adapters.weights_files import LARGEST_WEIGHTS
from csulora.errors import InputError, UnsafeFileError, UnsafeNameError
from csulora.io.files import is_gguf_name, sha256_of_file
from csulora.serving.open_decision import ADAPTER_FILES
from csulora.serving.signatures import signature_file_of

RECORD_FILE = "csulora_guard.json"
REFUSED = ".refused.json"
MOST_FILES = 1000  # in an upload, which needs two
LONGEST_NAME = 200  # bytes; what is written beside a result has a longer one

# Identity and times of an entry and of every file in it: equal before and after means untouched in between.
Signature = tuple[tuple[str | int, ...], ...]


def is_upload(path: Path) -> bool:
    """Whether an entry is to be decided on; hidden ones are uploads under way."""
    name = path.name
    is_adapter = is_gguf_name(name) or path.is_symlink() or not path.is_file()
    return is_adapter and not name.startswith(".")


def is_presentable(name: str) -> bool:
    """Whether a name can stand in logs and documents as it is, and be made longer."""
    return name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME


def signature_of(path: Path) -> Signature:
    """Describe an entry, a file with its signature beside it; empty if it is gone."""
    try:
        files = _first_files(path) if stat.S_ISDIR(path.lstat().st_mode) else _signature_beside(path)
        return tuple(_signature_of_file(file) for file in (path, *files))
    except OSError:
        return ()


def _first_files(directory: Path) -> list[Path]:
    """List a directory; of too many files no more than show that they are too many."""
    with os.scandir(directory) as entries:
        return sorted(directory / entry.name for entry in islice(entries, MOST_FILES))


def _signature_beside(file: Path) -> list[Path]:
    beside = signature_file_of(file)
    return [beside] if os.path.lexists(beside) else []


def _signature_of_file(path: Path) -> tuple[str | int, ...]:
    status = path.lstat()
    return path.name, status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def contents_of(
    path: Path, signature: Signature, every_file: bool = False, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Hash an entry: name -> sha256 of the files that make the adapter, or of all, name -> kind of everything else.

    Args:
        path: of the entry.
        signature: what `signature_of` returned for it.
        every_file: hash all files.
        known: sha256 of files that were hashed since ``signature`` was taken; they are not read again.
    """
    found: dict[str, str] = {}
    left = LARGEST_WEIGHTS  # bytes; what is beyond makes the adapter unreadable
    is_file = bool(signature) and stat.S_ISREG(int(signature[0][1]))
    for name, mode, _, size, *_ in signature:
        file = path.with_name(str(name)) if is_file else path / str(name)
        found[str(name)] = f"kind {stat.S_IFMT(int(mode)):o}"
        if stat.S_ISREG(int(mode)) and (is_file or every_file or ADAPTER_FILES.fullmatch(str(name))):
            with suppress(InputError):  # unreadable or too large: reading it as an adapter will say so
                found[str(name)] = (known or {}).get(str(name)) or sha256_of_file(file, left)
                left -= int(size)
        elif stat.S_ISDIR(int(mode)) and every_file:
            found[str(name)] += f" {_listing(file)}"
    return found


def _listing(directory: Path) -> str:
    """Return one hash of what lies in a directory within an upload: a signature covers that too."""
    files = islice(directory.rglob("*"), MOST_FILES)
    with suppress(OSError):
        lines = sorted(f"{file.relative_to(directory)!r} {_signature_of_file(file)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode(errors="backslashreplace")).hexdigest()
    return ""


def content_sha256(contents: Mapping[str, str]) -> str:
    """Return one hash of what `contents_of` found."""
    return hashlib.sha256("".join(f"{name!r} {what}\n" for name, what in contents.items()).encode()).hexdigest()


def check_name(path: Path) -> None:
    """Raise `UnsafeNameError` for an upload whose result would look like something else in OUTGOING."""
    if path.name.endswith((REFUSED, RECORD_FILE)):
        raise UnsafeNameError(f"{path}: is named like a file of the guard's own; rename it")
    if is_gguf_name(path) and path.is_dir():
        raise UnsafeNameError(f"{path}: is a directory, and named like a GGUF file; rename it")


def check_files(path: Path, signature: Signature) -> None:
    """Raise `UnsafeFileError` for an upload of too many files or with links, of which none is read."""
    if len(signature) > MOST_FILES:
        raise UnsafeFileError(f"{path}: holds more than {MOST_FILES} files; upload the adapter alone")
    for name, mode, *_ in signature:
        if stat.S_ISLNK(int(mode)):
            raise UnsafeFileError(f"{path}: {name} is a symbolic link; upload the files themselves")
