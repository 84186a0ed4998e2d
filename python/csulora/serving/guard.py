"""`csulora guard`: whatever appears in one directory appears corrected in another, or the reason why it does not.

For servers without a hook of their own: uploads go to INCOMING, and the server is pointed at OUTGOING.

    INCOMING/name        an adapter directory, or a file ``name.gguf``
    OUTGOING/name        the corrected adapter in the same format, complete
    OUTGOING/name.refused.json    or, instead of it, why there is none

What was decided is recorded beside the result: the hash of the input and the fingerprint of subspace file, policy and
version. After a restart, an input whose record still holds is left alone. Names that begin with a dot, and files
that are no GGUF, are ignored.

Whatever one upload does, the next is decided on. What this machine fails to do (a full disk, a log that cannot be
written) is tried again, at longer and longer intervals.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from csulora.adapters.disk import save_adapter, weights_file_of
from csulora.adapters.lora import Adapter
from csulora.errors import InputError, RefusedError, printable
from csulora.io.files import (
    GGUF_SUFFIX,
    locked,
    remove_abandoned,
    to_json,
    workplace,
    write_text,
)
from csulora.models.gguf_base import BaseModel
from csulora.serving.decisions import LogError
from csulora.serving.gate import Gate, OpenDecision
from csulora.serving.interrupted import Interrupted
from csulora.serving.provenance import Seal, seals_beside
from csulora.serving.systemd import ALIVE, READY, STOPPING, notify
from csulora.serving.together import Sets
from csulora.serving.uploads import (
    LONGEST_NAME,
    MOST_FILES,
    RECORD_FILE,
    REFUSED,
    Signature,
    content_sha256,
    holds,
    is_presentable,
    is_upload,
    refusal_of,
    signature_of,
)

_LOCK_FILE = ".csulora-guard.lock"
_INTERRUPTED_FILE = ".csulora-guard.deciding"
_LONGEST_DECISION = 900.0  # seconds after which a decision is one that hangs, and systemd is no longer told otherwise
_HEARTBEAT = 1.0  # seconds
_GRACE = 5.0  # seconds that a decision may take after `stop`
_TRIES = 3  # without `watch`
_LONGEST_WAIT = 60.0  # seconds between tries

Say = Callable[[str], None]


@dataclass
class _Entry:
    """What is known of one name in INCOMING."""

    signature: Signature
    since: float  # monotonic time at which this signature was first seen, or deciding last failed
    wait: float  # seconds from then until it is to be decided on
    decided: bool = False
    failures: int = 0  # how often this machine failed to decide
    reason: str = ""  # of the last failure
    waiting: bool = False  # whether somebody was told that it cannot be read yet, in this content or the one before


class DirectoryGuard:
    """Keeps OUTGOING the corrected image of INCOMING."""

    def __init__(
        self,
        incoming: Path,
        outgoing: Path,
        gate: Gate,
        settle: float = 2.0,
        patience: float = 60.0,
        base_model: str | Path | None = None,
        say: Say = print,
        together: Sequence[str] = (),
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
            together: globs over names that the server adds up; see `csulora.serving.together`.

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
        self._base_model_identity = BaseModel.open(base_model).identity if base_model else ""
        self._sets = Sets(together, self.outgoing, gate, base_model)
        self._entries: dict[str, _Entry] = {}
        self._interrupted = Interrupted(self.outgoing / _INTERRUPTED_FILE)
        self._working_since = time.monotonic()
        self._stop = threading.Event()

    def run(self, watch: bool, interval: float = 0.5) -> bool:
        """Scan until nothing is left to decide, or with ``watch`` until `stop` is called.

        Decisions are made on a thread of their own, so that this one answers `stop`. systemd, if it started this
        process, is told that it lives; see `csulora.serving.systemd`.

        Returns:
            Whether the thread is done. If not, it was left in the middle of a decision: end the process, and the next
            one decides again.

        Raises:
            InputError: another guard writes to OUTGOING, or without ``watch`` an upload could not be decided on.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="csulora-guard")
        with self._alone():
            self._tell(f"guarding {self.incoming} -> {self.outgoing} with subspace file {self.gate.subspace.sha256}")
            notify(READY)
            work = pool.submit(self._scan_repeatedly, watch, interval)
            while not work.done() and not self._stop.is_set():
                if time.monotonic() - self._working_since < _LONGEST_DECISION:
                    notify(ALIVE)
                wait([work], _HEARTBEAT)
            notify(STOPPING)
            pool.shutdown(wait=False)
            if not wait([work], _GRACE).done:
                self._interrupted.clear()
                return False
            work.result()
        undecided = {name: entry for name, entry in self._entries.items() if entry.failures and not entry.decided}
        if undecided:
            reasons = "; ".join(f"{name}: {entry.reason}" for name, entry in undecided.items())
            raise InputError(f"{len(undecided)} uploads could not be decided on; {reasons}")
        return True

    def _scan_repeatedly(self, watch: bool, interval: float) -> None:
        done = False
        while not self._stop.is_set() and (watch or not done):
            try:
                done = self.scan()
            except OSError as error:  # a file system that may come back
                if not watch:
                    raise
                self._tell(f"{self.incoming}: cannot be listed: {error}")
            if watch or not done:
                self._stop.wait(interval)

    def stop(self) -> None:
        """Make `run` return after the adapter it is working on, or after five seconds of that.

        May be called from a signal handler or a thread.
        """
        self._stop.set()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold OUTGOING for this process, and remove what a killed one left unfinished."""
        with ExitStack() as owned:
            try:
                owned.enter_context(locked(self.outgoing, _LOCK_FILE))
            except BlockingIOError:
                raise InputError(f"{self.outgoing}: another guard writes there") from None
            remove_abandoned(self.outgoing)
            yield

    def scan(self) -> bool:
        """Look at every entry once and decide what can be decided; return whether nothing is left to wait for."""
        self._working_since = time.monotonic()
        self._entries = {path.name: self._look(path) for path in sorted(self.incoming.iterdir()) if is_upload(path)}
        in_order = sorted(self._entries.items(), key=lambda item: self._interrupted.times(item[0], item[1].signature))
        for name, entry in in_order:
            if self._stop.is_set():
                return False
            if not entry.decided and time.monotonic() - entry.since >= entry.wait:
                self._working_since = time.monotonic()
                entry.decided = self._decide_or_postpone(name, entry)
        return all(entry.decided or entry.failures >= _TRIES for entry in self._entries.values())

    def _look(self, path: Path) -> _Entry:
        signature = signature_of(path)
        known = self._entries.get(path.name)
        if known and known.signature == signature:
            return known
        waiting = known is not None and known.waiting and not known.decided
        return _Entry(signature, time.monotonic(), self.settle, waiting=waiting)

    def _decide_or_postpone(self, name: str, entry: _Entry) -> bool:
        try:
            with self._interrupted.deciding(name, entry.signature):
                return self._decide(name, entry)
        except Exception as error:  # a disk, a log or a bug of ours: it must not keep others from being decided on
            reason = str(error) or repr(error)
            entry.failures, entry.reason = entry.failures + 1, reason
            entry.since, entry.wait = time.monotonic(), min(2.0**entry.failures, _LONGEST_WAIT)
            with suppress(Exception):  # without what makes a record that holds: it is decided on again
                write_text(self._refusal(name), to_json(refusal_of(name, error)))
            self._tell(f"{name}: not decided on, tried again in {entry.wait:.0f} s: {reason}")
            return False

    def _decide(self, name: str, entry: _Entry) -> bool:
        """Publish the corrected adapter or the refusal; False if it is too early to tell.

        Raises:
            OSError, LogError: this machine cannot read the upload, write the result, or record the decision.
        """
        path = self.incoming / name
        if not is_presentable(name):
            return self._turn_away(name, path)
        record = {
            "input_sha256": content_sha256(path, entry.signature, every_file=self.gate.verifier is not None),
            "made_by": self.gate.fingerprint,
            "base_model": self._base_model_identity,
            **self._sets.record(name),
        }
        if self._is_recorded(name, record):
            return True
        try:
            with self.gate.decision(path) as decision:
                found = self._read(path, entry.signature, decision)
                if isinstance(found, InputError) and entry.wait < self.patience:
                    self._wait_for(name, entry, found)
                    return False
                if signature_of(path) != entry.signature:
                    return False
                if isinstance(found, Exception):
                    raise found
                corrected, report = decision.correct(found)
                with self._sets.admitting(name, corrected):
                    self._publish(name, corrected, record, self.gate.seal_for(path, found))
        except LogError:
            self._withdraw(name)  # what nobody recorded is not let through
            raise
        except OSError:
            raise
        except Exception as error:  # also a bug of ours: it must neither stop the guard nor let the adapter through
            return self._refuse(name, error, record)
        self._refusal(name).unlink(missing_ok=True)
        self._tell(f"{name}: corrected, {report.warning}relative change {report.totals.relative_change:.1%}")
        return True

    def _wait_for(self, name: str, entry: _Entry, error: InputError) -> None:
        """Give an upload that has come to a halt its time; one that goes on is a new entry. Say so once."""
        entry.wait = self.patience
        if not entry.waiting:
            self._tell(f"{name}: not readable yet ({error}); waiting up to {self.patience:g} s")
        entry.waiting = True

    def _turn_away(self, name: str, path: Path) -> bool:
        """Refuse an upload whose name can stand neither in a log nor in OUTGOING."""
        error = RefusedError(f"{path}: its name is longer than {LONGEST_NAME} bytes or not printable; rename it")
        with suppress(RefusedError), self.gate.decision(path):
            raise error
        write_text(self._refusal(name), to_json(refusal_of(name, error)))
        self._tell(f"{name}: refused: {error}")
        return True

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # nobody may be reading any more
            self.say(printable(line))

    def _read(self, path: Path, signature: Signature, decision: OpenDecision) -> Adapter | Exception:
        try:
            if self._interrupted.is_hopeless(path.name, signature):
                raise RefusedError(
                    f"{path}: guards were killed while they read it; it may need more memory than they get"
                )
            if len(signature) > MOST_FILES:
                raise RefusedError(f"{path}: holds more than {MOST_FILES} files; upload the adapter alone")
            for name, mode, *_ in signature:
                if stat.S_ISLNK(int(mode)):
                    raise RefusedError(f"{path}: {name} is a symbolic link; upload the files themselves")
            return decision.read(path, self.base_model)
        except Exception as error:
            error.__context__ = None
            return error.with_traceback(None)  # which holds the upload's bytes

    def _publish(self, name: str, corrected: Adapter, record: dict[str, str], seal: Seal | None) -> None:
        if name.endswith(GGUF_SUFFIX):
            save_adapter(corrected, self.outgoing / name, "gguf", base_model=self.base_model, seal=seal)
            write_text(self._record(name), to_json(record))
        else:
            if not (self.outgoing / name / weights_file_of(corrected.format)).exists():
                self._withdraw(name)  # a directory in another format is not replaced file by file
            documents = dict(corrected.documents) | {RECORD_FILE: to_json(record)}
            save_adapter(replace(corrected, documents=documents), self.outgoing / name, seal=seal)

    def _refuse(self, name: str, error: Exception, record: dict[str, str]) -> bool:
        self._withdraw(name)
        write_text(self._refusal(name), to_json(record | self._sets.refusal_record(name) | refusal_of(name, error)))
        self._tell(f"{name}: refused: {error}")
        return True

    def _is_recorded(self, name: str, record: dict[str, str]) -> bool:
        """Whether the record beside the result holds; the other kind of result, if there is one, is outdated."""
        if (self.outgoing / name).exists() and holds(self._record(name), record):
            self._refusal(name).unlink(missing_ok=True)
            return True
        if holds(self._refusal(name), record | self._sets.refusal_record(name)):
            self._withdraw(name)
            return True
        return False

    def _withdraw(self, name: str) -> None:
        """Take away the corrected form of what an adapter was before."""
        if not self._record(name).is_file():
            return
        if name.endswith(GGUF_SUFFIX):
            for file in (self.outgoing / name, *seals_beside(self.outgoing / name)):
                file.unlink(missing_ok=True)
            self._record(name).unlink()
        else:
            with workplace(self.outgoing / name) as place:
                (self.outgoing / name).rename(place / "old")

    def _record(self, name: str) -> Path:
        """Where the record of a corrected adapter lies: in its directory, or beside its file."""
        return (
            self.outgoing / f"{name}.{RECORD_FILE}"
            if name.endswith(GGUF_SUFFIX)
            else self.outgoing / name / RECORD_FILE
        )

    def _refusal(self, name: str) -> Path:
        if not is_presentable(name):
            shown = printable(name).encode()[:80].decode(errors="ignore")  # bytes count, and escapes are long
            name = f"{shown}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
        return self.outgoing / f"{name}{REFUSED}"
