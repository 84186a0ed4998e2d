"""What lies in INCOMING: which entries are uploads, whether one has changed, and what identifies its content."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path

from csulora.adapters.weights_files import LARGEST_WEIGHTS
from csulora.errors import InputError, printable
from csulora.io.files import GGUF_SUFFIX, parse_json, read_regular, sha256_of_file
from csulora.serving.signatures import signature_file_of

RECORD_FILE = "csulora_guard.json"
REFUSED = ".refused.json"
MOST_FILES = 1000  # in an upload, which needs two
_ADAPTER_FILES = re.compile(r"adapter_config\.json|adapters\.safetensors|adapter_model\S*\.safetensors(\.index\.json)?")
_LARGEST_RECORD = 1 << 20
LONGEST_NAME = 200  # bytes; what is written beside a result has a longer one

# Identity and times of an entry and of every file in it: equal before and after means untouched in between.
Signature = tuple[tuple[str | int, ...], ...]


def is_upload(path: Path) -> bool:
    """Whether an entry is to be decided on; hidden ones are uploads under way."""
    name = path.name
    is_adapter = name.endswith(GGUF_SUFFIX) or path.is_symlink() or not path.is_file()
    return is_adapter and not name.startswith(".") and not name.endswith((REFUSED, RECORD_FILE))


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


def content_sha256(path: Path, signature: Signature, every_file: bool = False) -> str:
    """Hash an entry: the names and kinds of its files, and the contents of those that make the adapter, or of all."""
    digest = hashlib.sha256()
    left = LARGEST_WEIGHTS  # bytes; what is beyond makes the adapter unreadable
    is_file = bool(signature) and stat.S_ISREG(int(signature[0][1]))
    for name, mode, _, size, *_ in signature:
        file = path.with_name(str(name)) if is_file else path / str(name)
        digest.update(f"{name!r} {stat.S_IFMT(int(mode))} ".encode())
        if stat.S_ISREG(int(mode)) and (is_file or every_file or _ADAPTER_FILES.fullmatch(str(name))):
            with suppress(InputError):  # unreadable or too large: reading it as an adapter will say so
                digest.update(sha256_of_file(file, left).encode())
                left -= int(size)
    return digest.hexdigest()


def refusal_of(name: str, error: Exception) -> dict[str, str]:
    """Return the record of a refusal."""
    reason = printable(str(error) or repr(error))
    return {"adapter": printable(name), "kind": type(error).__name__, "reason": reason}


def holds(file: Path, record: dict[str, str]) -> bool:
    """Whether a record in a file says all that ``record`` does."""
    try:
        found = parse_json(read_regular(file, _LARGEST_RECORD), file)
    except InputError:
        return False
    return record.items() <= found.items()
