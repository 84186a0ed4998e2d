"""The guard as a service: looks at INCOMING again and again, has uploads decided on, and answers signals and probes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from csulora.errors import CsuloraError, InputError, LogError, printable
from csulora.io.files import locked, make_directory, remove_abandoned
from csulora.models.gguf_base import BaseModel
from csulora.serving import metrics
from csulora.serving.gate import Gate
from csulora.serving.guard.entries import Entries, Entry
from csulora.serving.guard.health import HealthFile
from csulora.serving.guard.journal import Journal
from csulora.serving.guard.judge import TOO_EARLY, Judge
from csulora.serving.guard.options import PRESENT_FILE, Options
from csulora.serving.guard.outgoing import Outgoing
from csulora.serving.guard.quarantine import Quarantine
from csulora.serving.guard.together import Sets
from csulora.serving.systemd import ALIVE, READY, STOPPING, notify, reloading

_LOCK_FILE = ".csulora-guard.lock"
_LONGEST_DECISION = 900.0  # seconds after which a decision is one that hangs, and systemd is no longer told otherwise
_HEARTBEAT = 1.0  # seconds
_GRACE = 5.0  # seconds that decisions may take after `stop`
_ORDER = ("corrected", "refused", "invalid", "failed", "withdrawn")

Say = Callable[[str], None]


class DirectoryGuard:
    """Keeps OUTGOING the corrected image of INCOMING."""

    def __init__(
        self,
        incoming: Path,
        outgoing: Path,
        gate: Gate,
        options: Options | None = None,
        say: Say = print,
        reopen: Callable[[], Gate] | None = None,
        reload: threading.Event | None = None,
    ) -> None:
        """Set the guard up.

        Args:
            incoming: where adapters are uploaded to.
            outgoing: where corrected ones are to appear; created if absent.
            gate: decides.
            options: how the guard works.
            say: receives a line for every decision.
            reopen: returns the gate of policy and subspace file as they are by then.
            reload: set it, in a signal handler or a thread, to have `run` read policy and subspace file again. If they
                are not usable, the old ones stay in force. What was decided by others is decided on anew; until then
                it stays in OUTGOING.

        Raises:
            InputError: a directory is missing, or one lies inside the other, or an option does not fit them.
        """
        if not incoming.is_dir():
            raise InputError(f"{incoming}: no such directory; name the one that adapters are uploaded to")
        self.incoming, self.outgoing = incoming.resolve(), outgoing.resolve()
        if self.incoming.is_relative_to(self.outgoing) or self.outgoing.is_relative_to(self.incoming):
            raise InputError(f"{incoming} and {outgoing} must not lie inside each other; choose another place for one")
        self.options = options or Options()
        self.gate, self.say, self._reopen = gate, say, reopen or (lambda: gate)
        if self.options.withdraw and not self._is_present():
            raise InputError(
                f"{self.incoming / PRESENT_FILE}: no such file; without it a volume that is not mounted would look as "
                f"if all uploads were gone; make it once: touch {self.incoming / PRESENT_FILE}"
            )
        make_directory(self.outgoing)
        self._health = HealthFile(self.options.health) if self.options.health else None
        base_model, aside = self.options.base_model, self.options.quarantine
        self._results = Outgoing(self.outgoing, base_model)
        self._sets = Sets(self.options.together, self.outgoing, base_model)
        self._sets.check_limit(gate.policy)
        self._entries = Entries(self.options.settle)
        self._verdicts: dict[str, str] = {}
        self._journal = Journal(self.outgoing)
        self._judge = Judge(
            self.incoming,
            self._results,
            self._journal,
            Quarantine(aside, self.incoming, self.outgoing) if aside else None,
            self.options,
            BaseModel.open(base_model).identity if base_model else "",
            self._tell,
            self._sets,
        )
        self._threads = ThreadPoolExecutor(self.options.jobs, thread_name_prefix="csulora-guard-job")
        self._working_since: dict[str, float] = {}
        self._scanned = False
        self._reload_error: str | None = None
        self._stop, self._reload = threading.Event(), reload or threading.Event()

    def run(self, watch: bool, interval: float = 0.5) -> bool:
        """Scan until nothing is left to decide, or with ``watch`` until `stop` is called.

        Decisions are made on threads of their own, so that this one answers `stop` and ``reload``. systemd, if it
        started this process, is told that it lives; see `csulora.serving.systemd`.

        Returns:
            Whether the threads are done. If not, they were left in the middle of a decision: end the process, and the
            next one decides again.

        Raises:
            InputError: another guard writes to OUTGOING, or without ``watch`` an upload could not be decided on.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="csulora-guard")
        with self._alone():
            self._tell(f"guarding {self.incoming} -> {self.outgoing} with subspace file {self.gate.subspace.sha256}")
            self._tell_what_is_outdated()
            notify(READY)
            work = pool.submit(self._scan_repeatedly, watch, interval)
            while not work.done() and not self._stop.is_set():
                self._beat()
                if self._reload.is_set():
                    self._reload.clear()
                    self._read_rules_again()
                wait([work], _HEARTBEAT)
            notify(STOPPING)
            pool.shutdown(wait=False)
            is_done = bool(wait([work], _GRACE).done)
            if self._health:
                self._health.remove()
            if not is_done:
                self._journal.clear()
                return False
            work.result()
        self._threads.shutdown()
        undecided = {name: entry for name, entry in self._entries.items() if entry.failures and not entry.decided_by}
        if undecided and not watch:
            reasons = "; ".join(f"{name}: {entry.reason}" for name, entry in undecided.items())
            raise InputError(f"{len(undecided)} uploads could not be decided on; {reasons}")
        return True

    def stop(self) -> None:
        """Make `run` return after the adapters it is working on, or after five seconds of that.

        May be called from a signal handler or a thread.
        """
        self._stop.set()

    @property
    def not_let_through(self) -> list[str]:
        """Names of the uploads whose last verdict is another than corrected."""
        return sorted(name for name, verdict in self._verdicts.items() if verdict not in ("corrected", "withdrawn"))

    @property
    def summary(self) -> str:
        """How many uploads got which verdict since this guard started: ``1 corrected, 2 refused, 1 invalid``."""
        counts = Counter(self._verdicts.values())
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in _ORDER if counts[verdict]) or "no uploads"

    def scan(self) -> bool:
        """Look at every entry once and decide what can be decided; return whether nothing is left to wait for."""
        gate = self.gate
        self._recover(gate)
        if self.options.withdraw:
            self._withdraw_what_is_gone(gate)
        self._entries.look(self.incoming)
        self._journal.forget_others({name: entry.signature for name, entry in self._entries.items()})
        due = {name: entry for name, entry in self._entries.items() if entry.is_due(gate.fingerprint)}
        killed = {name: self._journal.times(name, entry.signature) for name, entry in due.items()}
        self._decide_all([name for name in due if not killed[name]], gate, self.options.jobs)
        # What guards were killed at comes last, and alone, so that no other is blamed.
        self._decide_all(sorted((name for name in due if killed[name]), key=killed.__getitem__), gate, 1)
        left = [entry for entry in self._entries.values() if entry.is_left(gate.fingerprint)]
        self._scanned = not self._stop.is_set()
        if (found := metrics.of_guard()) is not None:
            found.undecided.set(sum(entry.decided_by != gate.fingerprint for entry in self._entries.values()))
            found.scanned.set_to_current_time()
        return not left and not self._entries.is_losing and self._scanned

    def _decide_all(self, names: Iterable[str], gate: Gate, jobs: int) -> None:
        running: set[Future[None]] = set()
        for name in names:
            if len(running) >= jobs:
                running = wait(running, return_when=FIRST_COMPLETED).not_done
            if self._stop.is_set():
                break
            running.add(self._threads.submit(self._decide_or_postpone, name, self._entries[name], gate))
        wait(running)

    def _decide_or_postpone(self, name: str, entry: Entry, gate: Gate) -> None:
        self._working_since[name] = time.monotonic()
        try:
            verdict = self._judge.decide(name, entry, gate)
        except Exception as error:  # a disk, a log or a bug of ours: it must not keep others from being decided on
            entry.postpone(str(error) or repr(error))
            self._judge.undecided(name, error)
            self._tell(f"{name}: not decided on, tried again in {entry.wait:.0f} s: {entry.reason}")
        else:
            if verdict != TOO_EARLY:
                entry.decided_by, entry.failures, entry.reason = gate.fingerprint, 0, ""
                self._verdicts[name] = verdict
        finally:
            del self._working_since[name]

    def _withdraw_what_is_gone(self, gate: Gate) -> None:
        """Withdraw what has no upload, unless INCOMING is not there, before it is listed or after."""
        if not self._is_present():
            raise OSError(
                f"{self.incoming}: lacks {PRESENT_FILE}; nothing is withdrawn, nor decided on, until it is there"
            )
        names = [path.name for path in self.incoming.iterdir()]
        if not self._is_present():
            return
        for name in self._entries.gone(self._results.without(names)):
            try:
                self._judge.withdraw(name, gate)
            except (OSError, CsuloraError) as error:
                self._tell(f"{name}: not withdrawn, tried again: {error}")
            else:
                self._entries.withdrawn(name)
                self._verdicts[name] = "withdrawn"

    def _is_present(self) -> bool:
        return (self.incoming / PRESENT_FILE).is_file()

    def _scan_repeatedly(self, watch: bool, interval: float) -> None:
        done, said = False, ""
        while not self._stop.is_set() and (watch or not done):
            try:
                done, said = self.scan(), ""
            except OSError as error:  # a file system that may come back
                if not watch:
                    raise
                if (reason := str(error)) != said:
                    self._tell(f"nothing is decided on now: {reason}")
                said = reason
            if watch or not done:
                self._stop.wait(interval)

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

    def _recover(self, gate: Gate) -> None:
        """Record what took effect before somebody got to record it."""
        try:
            if count := self._journal.recover(gate.log, self._results.outcome):
                self._tell(f"recorded {count} decisions that took effect before and were not in the log yet")
        except LogError as error:
            raise OSError(str(error)) from error  # as a file system that may come back

    def _tell_what_is_outdated(self) -> None:
        standing = [self._results.standing(name) for name in self._results.names()]
        count = sum(found is not None and found.record.get("made_by") != self.gate.fingerprint for found in standing)
        if count:
            self._tell(
                f"{count} results are of another policy, subspace file or version; each stays until its upload is "
                "decided on anew"
            )

    def _read_rules_again(self) -> None:
        notify(reloading())
        try:
            gate = self._reopen()
            self._sets.check_limit(gate.policy)
        except (CsuloraError, OSError) as error:
            self._reload_error = printable(error)
            self._tell(f"policy and subspace file stay as they were, since what is there now is not usable: {error}")
        else:
            self._reload_error = None
            is_same, self.gate = gate.fingerprint == self.gate.fingerprint, gate
            self._tell(f"policy and subspace file were read again: {'no change' if is_same else 'they are others'}")
            if not is_same:
                self._tell_what_is_outdated()
        if (found := metrics.of_guard()) is not None:
            found.reloads.labels(result="failed" if self._reload_error else "done").inc()
        notify(READY)

    def _beat(self) -> None:
        """Say that the guard lives, unless a decision hangs."""
        now = time.monotonic()
        if any(now - since >= _LONGEST_DECISION for since in list(self._working_since.values())):
            return
        notify(ALIVE)
        if self._health:
            fingerprint = self.gate.fingerprint
            entries = list(self._entries.values())
            self._health.write(
                {
                    "ready": self._scanned,
                    "undecided": sum(entry.decided_by != fingerprint for entry in entries),
                    "verdicts": dict(Counter(self._verdicts.copy().values())),
                    "fingerprint": fingerprint,
                    "subspace_sha256": self.gate.subspace.sha256,
                    "policy_sha256": self.gate.source.sha256,
                    "reload_error": self._reload_error,
                }
            )

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # nobody may be reading any more
            self.say(printable(line))
