"""Files that appear complete or not at all, and documents that are read within bounds."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from csulora.errors import InputError, MissingFileError

LOCK_FILE = "lock"
_DEEPEST_DOCUMENT = 32  # levels; what csulora reads has at most six
_PRIVATE = 0o600

WORKPLACE_SUFFIX = r"\.[0-9a-f]{8}\.csulora-tmp"
_WORKPLACE = re.compile(rf"\.(?P<name>.+){WORKPLACE_SUFFIX}", re.DOTALL)  # names may hold a newline


def is_gguf_name(path: str | Path) -> bool:
    """Whether a file is named as GGUF files are, in small letters or capitals."""
    return str(path).lower().endswith(".gguf")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_parent(path: Path) -> None:
    """Raise `InputError` unless ``path`` could be created: its directory exists and is writable."""
    if not path.name:
        raise InputError(f"{path}: is a directory; name what to write in it")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent}: no such directory; create it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: not writable; choose another place for {path.name}")


def make_directory(path: Path) -> None:
    """Create a directory that is to hold results, unless it is there; raises `InputError` if that is not possible."""
    if path.is_dir():
        return
    check_parent(path)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise InputError(f"{path}: is no directory; name another place") from None


def check_file(path: Path) -> None:
    """Raise `InputError` unless ``path`` could be written: it is a file, or there is nothing yet.

    A device or a pipe is no file: the rename that makes a file appear at once would put an end to it.
    """
    check_parent(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file; name another")


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Raise `InputError` if an output is an input or an output before it, or lies in one.

    What lies in a directory belongs to it: a signature covers it, and whoever copies the directory takes it along.

    Args:
        outputs: files and directories to be written.
        inputs: files and directories that are read; others are hub ids, or reading them says what is wrong.
    """
    sources = {real_path(source) for source in inputs if os.path.lexists(source)}
    before: set[Path] = set()
    for output in outputs:
        place = real_path(output)
        within = {place, *place.parents}
        if sources & within:
            raise InputError(f"{output}: is read, or lies in what is read; choose another place")
        if before & within:
            raise InputError(f"{output}: is written, or lies in what is written; choose another place")
        before.add(place)


def real_path(path: str | Path) -> Path:
    """Return a path without symbolic links, as far as they lead anywhere; `Path.resolve` fails where they go round."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success the file there takes the place of ``path``, flushed to disk.

    With ``private``, its owner alone may read and write the file, whatever was there before.
    """
    check_file(path)
    with workplace(path) as place:
        temporary = place / "new"
        temporary.touch()
        permissions = _PRIVATE if private else temporary.stat().st_mode
        yield temporary
        # safetensors replaces the file by one that only its owner may read.
        temporary.chmod(permissions)
        _flush_to_disk(temporary)
        temporary.replace(path)
        _flush_to_disk(path.absolute().parent)


@contextmanager
def atomic_directory(path: Path, marker: str, optional: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary directory that on success becomes ``path``.

    An existing ``path`` is replaced if it is empty, or if csulora wrote it: it holds the file ``marker`` and
    nothing that the new directory does not hold too, but for the ``optional`` files.

    Raises:
        InputError: ``path`` cannot be created or must not be replaced, or another process wrote it meanwhile.
    """
    check_parent(path)
    with workplace(path) as place:
        temporary = place / "new" / path.name  # what seals it may note its name
        temporary.mkdir(parents=True)
        permissions = temporary.stat().st_mode & 0o666
        yield temporary
        _check_replaceable(path, marker, {file.name for file in temporary.iterdir()}.union(optional))
        for file in temporary.iterdir():
            file.chmod(permissions)
            _flush_to_disk(file)
        _flush_to_disk(temporary)
        try:
            if path.exists():
                # A directory cannot be renamed over another: for a moment there is none.
                path.rename(place / "old")
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise InputError(f"{path}: another process wrote it meanwhile; see which of the two is wanted") from error
        _flush_to_disk(path.absolute().parent)


def _check_replaceable(path: Path, marker: str, replacements: set[str]) -> None:
    if not os.path.lexists(path):
        return
    present = {file.name for file in path.iterdir()} if path.is_dir() and not path.is_symlink() else None
    if present is None or (present and marker not in present):
        raise InputError(f"{path}: exists and was not written by csulora; remove it or choose another name")
    if present - replacements:
        raise InputError(
            f"{path}: holds {min(present - replacements)}, which csulora did not write; "
            "remove it or choose another name"
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the block name ``path``, if it is the file system's and names no file, as those of writing."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """Yield a directory beside ``path`` for what is to become ``path``; nothing of it is left afterwards.

    Its owner holds a lock on it, which ends with the process: what a killed process left behind is recognised by
    being unlocked, and removed when ``path`` is written the next time.
    """
    remove_abandoned(path.absolute().parent, path.name)
    with ExitStack() as owned:
        place = _own_workplace(path.absolute(), owned)
        try:
            with naming(path):
                yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def remove_abandoned(directory: Path, name: str | None = None) -> None:
    """Remove the workplaces for ``name``, or for whatever name, that no running process owns."""
    try:
        with os.scandir(directory) as entries:
            found = [(_WORKPLACE.fullmatch(entry.name), entry) for entry in entries]
            places = [
                Path(entry.path)
                for match, entry in found
                if match and match["name"] == (name or match["name"]) and not entry.is_symlink()
            ]
    except FileNotFoundError:
        return
    for place in places:
        with suppress(OSError), locked(place):  # fails if it is owned, gone, or another user's
            shutil.rmtree(place, ignore_errors=True)


def _own_workplace(path: Path, owned: ExitStack) -> Path:
    """Create a workplace for ``path`` and lock it until ``owned`` is closed."""
    while True:
        place = path.with_name(f".{path.name}.{secrets.token_hex(4)}.csulora-tmp")
        place.mkdir(mode=0o700)
        try:
            owned.enter_context(locked(place))
        except (FileNotFoundError, BlockingIOError):
            continue  # another process saw it before it was locked, and takes it for abandoned
        return place


@contextmanager
def locked(place: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold a directory's lock; raises BlockingIOError if somebody else does, and OSError if the directory is gone."""
    # A file's, because a network file system cannot lock directories.
    lock = os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (place / name).lstat()
        yield
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; what UTF-8 lacks, in names that are not UTF-8, as an escape of JSON's."""
    with atomic_file(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from error


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading; a FIFO or a device is never waited for.

    Raises:
        InputError: ``path`` is missing, is something else, or is larger than ``limit`` bytes.
    """
    try:
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if limit is not None and status.st_size > limit:
            raise InputError(f"{path}: has {status.st_size} bytes; at most {limit} are read")
        yield file


def read_regular(path: Path, limit: int) -> bytes:
    """Read a whole file as `open_regular` opens it; bytes added meanwhile are left out."""
    with open_regular(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no key twice, no number that is not finite, at most 32 levels deep.

    Raises:
        InputError: ``data``, which ``path`` holds, is anything else.
    """
    refused: list[str] = []  # NaN, Infinity, 1e999

    def number_of(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            refused.append(text)
        return number

    try:
        # Of bytes, json guesses the encoding, and takes what no other reader does.
        document = json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=number_of, parse_float=number_of
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object")
    _check_depth(document, path)
    if refused:
        where = next(keys for keys, number in _floats(document) if not math.isfinite(number))
        raise InputError(f"{path}: {where} is {refused[0]}; write a finite number that a float64 holds")
    return document


def _check_depth(document: Any, path: Path) -> None:
    level = [document]
    for _ in range(_DEEPEST_DOCUMENT):
        children = chain.from_iterable(node.values() if type(node) is dict else node for node in level)
        level = [child for child in children if type(child) in (dict, list)]
        if not level:
            return
    raise InputError(f"{path}: is nested more than {_DEEPEST_DOCUMENT} levels deep; no document of csulora's is")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document


def _floats(node: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number that is not whole, and the keys that lead to it: ``alpha_pattern.down_proj``, ``sizes[0]``."""
    if isinstance(node, float):
        yield where, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _floats(child, f"{where}.{key}" if where else key)
    elif isinstance(node, list):
        for at, child in enumerate(node):
            yield from _floats(child, f"{where}[{at}]")


def identity_of_file(path: Path) -> tuple[int, int, int, int]:
    """Return what changes when a file is replaced or written to: device, inode, size and time of modification."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sha256_of_file(path: Path, limit: int | None = None) -> str:
    """Hex sha256 of the bytes of a file that `open_regular` opens."""
    with open_regular(path, limit) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(document: Any, *, sort_keys: bool = True) -> str:
    """Return deterministic JSON without NaN or infinity: keys sorted unless said, two spaces, a newline at the end."""
    return json.dumps(document, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"
