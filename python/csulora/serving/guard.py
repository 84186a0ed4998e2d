"""`csulora guard`: whatever appears in one directory appears corrected in another, or the reason why it does not.

For servers without a hook of their own: uploads go to INCOMING, and the server is pointed at OUTGOING.

    INCOMING/name        an adapter directory, or a file ``name.gguf``
    OUTGOING/name        the corrected adapter in the same format, complete
    OUTGOING/name.refused.json    or, instead of it, why there is none

What was decided is recorded beside the result: the hash of the input and the fingerprint of pack, policy and
version. After a restart, an input whose record still holds is left alone. Names that begin with a dot, and files
that are no GGUF, are ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from csulora.adapters.disk import load_adapter, save_adapter
from csulora.adapters.lora import Adapter
from csulora.adapters.peft.config import CONFIG_FILE
from csulora.adapters.peft.directory import LARGEST_WEIGHTS
from csulora.errors import CsuloraError, InputError, RefusedError
from csulora.io.files import parse_json, read_regular, remove_abandoned, sha256_of_file, to_json, workplace, write_text
from csulora.serving.decisions import LogError
from csulora.serving.gate import Gate
from csulora.serving.systemd import ALIVE, READY, STOPPING, notify

RECORD_FILE = "csulora_guard.json"
REFUSED = ".refused.json"
GGUF = ".gguf"

_LOCK_FILE = ".csulora-guard.lock"
_LARGEST_RECORD = 1 << 20
_LONGEST_NAME = 200  # bytes; what is written beside a result has a longer one

# Identity and times of an entry and of every file in it: equal before and after means untouched in between.
_Signature = tuple[tuple[str | int, ...], ...]

Say = Callable[[str], None]


@dataclass
class _Entry:
    """What is known of one name in INCOMING."""

    signature: _Signature
    since: float  # monotonic time at which this signature was first seen
    wait: float  # seconds from then until it is to be decided on
    decided: bool = False


class DirectoryGuard:
    """Keeps OUTGOING the corrected image of INCOMING."""

    def __init__(
        self,
        incoming: Path,
        outgoing: Path,
        gate: Gate,
        settle: float = 2.0,
        patience: float = 60.0,
        base_model: Path | None = None,
        say: Say = print,
    ) -> None:
        """Set the guard up.

        Args:
            incoming: where adapters are uploaded to.
            outgoing: where corrected ones are to appear; created if absent.
            gate: decides.
            settle: seconds for which an entry must not change before it is read.
            patience: seconds for which an entry that cannot be read may be an upload that has come to a halt;
                after that it is refused as malformed.
            base_model: the model that GGUF files are for; without it they are refused.
            say: receives a line for every decision.

        Raises:
            InputError: a directory is missing, or one lies inside the other.
        """
        if not incoming.is_dir():
            raise InputError(f"{incoming}: no such directory")
        self.incoming, self.outgoing = incoming.resolve(), outgoing.resolve()
        if self.incoming.is_relative_to(self.outgoing) or self.outgoing.is_relative_to(self.incoming):
            raise InputError(f"{outgoing}: neither directory may lie inside the other")
        self.outgoing.mkdir(exist_ok=True)
        self.gate, self.settle, self.patience, self.say = gate, settle, patience, say
        self.base_model = base_model
        self._entries: dict[str, _Entry] = {}
        self._stop = threading.Event()

    def run(self, watch: bool, interval: float = 0.5) -> None:
        """Scan until nothing is left to decide, or with ``watch`` until `stop` is called.

        systemd, if it started this process, is told so; see `csulora.serving.systemd`.

        Raises:
            InputError: another guard writes to OUTGOING.
        """
        with self._alone():
            self.say(f"guarding {self.incoming} -> {self.outgoing} with pack {self.gate.pack.sha256}")
            notify(READY)
            done = self.scan()
            while not self._stop.is_set() and (watch or not done):
                self._stop.wait(interval)
                done = self.scan()
            notify(STOPPING)

    def stop(self) -> None:
        """Make `run` return after the adapter it is working on; may be called from a signal handler or a thread."""
        self._stop.set()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold OUTGOING for this process, and remove what a killed one left unfinished."""
        with (self.outgoing / _LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.outgoing}: another guard writes there") from None
            remove_abandoned(self.outgoing)
            yield

    def scan(self) -> bool:
        """Look at every entry once and decide what can be decided; return whether nothing is left to wait for."""
        self._entries = {path.name: self._look(path) for path in sorted(self.incoming.iterdir()) if _is_entry(path)}
        notify(ALIVE)
        for name, entry in self._entries.items():
            if self._stop.is_set():
                return False
            if not entry.decided and time.monotonic() - entry.since >= entry.wait:
                entry.decided = self._decide(name, entry)
                notify(ALIVE)
        return all(entry.decided for entry in self._entries.values())

    def _look(self, path: Path) -> _Entry:
        signature = _signature(path)
        known = self._entries.get(path.name)
        return known if known and known.signature == signature else _Entry(signature, time.monotonic(), self.settle)

    def _decide(self, name: str, entry: _Entry) -> bool:
        """Publish the corrected adapter or the refusal; False if it is too early to tell."""
        path = self.incoming / name
        record = {"input_sha256": _content_sha256(path, entry.signature), "made_by": self.gate.fingerprint}
        if self._is_recorded(name, record):
            return True
        found = self._read(path, entry.signature)
        if isinstance(found, InputError) and entry.wait < self.patience:
            entry.wait = self.patience  # an upload may have come to a halt; if it goes on, this entry is a new one
            return False
        if _signature(path) != entry.signature:
            return False
        try:
            corrected, report = self.gate.admit(path, lambda _: _adapter_or_raise(found))
        except LogError:
            raise
        except Exception as error:  # also a bug of ours: it must neither stop the guard nor let the adapter through
            return self._refuse(name, error, record)
        try:
            self._publish(name, corrected, record)
        except CsuloraError as error:
            return self._refuse(name, error, record)
        self._refusal(name).unlink(missing_ok=True)
        self.say(f"{name}: corrected, change {report.totals.change:.1%}")
        return True

    def _read(self, path: Path, signature: _Signature) -> Adapter | Exception:
        try:
            for name, mode, *_ in signature:
                if stat.S_ISLNK(int(mode)):
                    raise RefusedError(f"{path}: {name} is a symbolic link; upload the files themselves")
            return load_adapter(path, self.base_model)
        except Exception as error:
            return error

    def _publish(self, name: str, corrected: Adapter, record: dict[str, str]) -> None:
        if name.endswith(GGUF):
            save_adapter(corrected, self.outgoing / name, "gguf", base_model=self.base_model)
            write_text(self._record(name), to_json(record))
        else:
            documents = dict(corrected.documents) | {RECORD_FILE: to_json(record)}
            save_adapter(replace(corrected, documents=documents), self.outgoing / name)

    def _refuse(self, name: str, error: Exception, record: dict[str, str]) -> bool:
        self._withdraw(name)
        refusal = record | {"adapter": name, "kind": type(error).__name__, "reason": str(error) or repr(error)}
        write_text(self._refusal(name), to_json(refusal))
        self.say(f"{name}: refused: {error}")
        return True

    def _is_recorded(self, name: str, record: dict[str, str]) -> bool:
        """Whether the record beside the result holds; the other kind of result, if there is one, is outdated."""
        if (self.outgoing / name).exists() and _holds(self._record(name), record):
            self._refusal(name).unlink(missing_ok=True)
            return True
        if _holds(self._refusal(name), record):
            self._withdraw(name)
            return True
        return False

    def _withdraw(self, name: str) -> None:
        """Take away the corrected form of what an adapter was before."""
        if not self._record(name).is_file():
            return
        if name.endswith(GGUF):
            (self.outgoing / name).unlink(missing_ok=True)
            self._record(name).unlink()
        else:
            with workplace(self.outgoing / name) as place:
                (self.outgoing / name).rename(place / "old")

    def _record(self, name: str) -> Path:
        """Where the record of a corrected adapter lies: in its directory, or beside its file."""
        return self.outgoing / f"{name}.{RECORD_FILE}" if name.endswith(GGUF) else self.outgoing / name / RECORD_FILE

    def _refusal(self, name: str) -> Path:
        return self.outgoing / f"{name}{REFUSED}"


def _is_entry(path: Path) -> bool:
    name = path.name
    is_adapter = name.endswith(GGUF) or path.is_symlink() or not path.is_file()
    return is_adapter and _is_presentable(name) and not name.endswith((REFUSED, RECORD_FILE))


def _is_presentable(name: str) -> bool:
    """Whether a name can stand in logs and in documents; excludes hidden ones, which are for uploads under way."""
    return name.isprintable() and not name.startswith(".") and len(os.fsencode(name)) <= _LONGEST_NAME


def _signature(path: Path) -> _Signature:
    """Describe an entry; empty if it is gone."""
    try:
        files = sorted(path.iterdir()) if stat.S_ISDIR(path.lstat().st_mode) else []
        return tuple(_signature_of_file(file) for file in (path, *files))
    except OSError:
        return ()


def _signature_of_file(path: Path) -> tuple[str | int, ...]:
    status = path.lstat()
    return path.name, status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _content_sha256(path: Path, signature: _Signature) -> str:
    """Hash an entry: the names and kinds of its files, and the contents of those that make the adapter."""
    digest = hashlib.sha256()
    for name, mode, *_ in signature:
        file = path if name == path.name and len(signature) == 1 else path / str(name)
        digest.update(f"{name!r} {stat.S_IFMT(int(mode))} ".encode())
        if stat.S_ISREG(int(mode)) and (name == CONFIG_FILE or str(name).endswith((".safetensors", GGUF))):
            with suppress(InputError):  # unreadable or too large: reading it as an adapter will say so
                digest.update(sha256_of_file(file, LARGEST_WEIGHTS).encode())
    return digest.hexdigest()


def _adapter_or_raise(found: Adapter | Exception) -> Adapter:
    if isinstance(found, Exception):
        raise found
    return found


def _holds(file: Path, record: dict[str, str]) -> bool:
    try:
        found = parse_json(read_regular(file, _LARGEST_RECORD), file)
    except InputError:
        return False
    return record.items() <= found.items()
