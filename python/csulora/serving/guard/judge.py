"""One upload from INCOMING to its result in OUTGOING and its line in the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from csulora.adapters.lora import Adapter
from csulora.errors import (
    ExhaustingError,
    InputError,
    LogError,
    UnsafeNameError,
    printable,
    reason_code_of,
)
from csulora.serving.gate import Gate, verdict_of
from csulora.serving.guard.entries import Entry
from csulora.serving.guard.journal import Journal, Trace
from csulora.serving.guard.options import Options
from csulora.serving.guard.outgoing import Outgoing
from csulora.serving.guard.quarantine import Quarantine
from csulora.serving.guard.together import Sets
from csulora.serving.guard.uploads import (
    LONGEST_NAME,
    Signature,
    check_files,
    check_name,
    content_sha256,
    contents_of,
    is_presentable,
    signature_of,
)
from csulora.serving.open_decision import OpenDecision

Tell = Callable[[str], None]
TOO_EARLY = ""  # in place of a verdict


class Judge:
    """Decides on uploads; several threads may ask for different ones."""

    def __init__(
        self,
        incoming: Path,
        outgoing: Outgoing,
        journal: Journal,
        quarantine: Quarantine | None,
        options: Options,
        base_model_identity: str,
        tell: Tell,
        sets: Sets,
    ) -> None:
        """Take what all decisions share."""
        self.incoming, self.outgoing, self.journal, self.quarantine = incoming, outgoing, journal, quarantine
        self.options, self.base_model_identity, self.tell, self.sets = options, base_model_identity, tell, sets

    def decide(self, name: str, entry: Entry, gate: Gate) -> str:
        """Publish the corrected adapter or the refusal, record that, and return the verdict.

        Returns:
            The verdict, also where an earlier one still holds; `TOO_EARLY` if the upload may not be complete.

        Raises:
            OSError, LogError: this machine cannot read the upload, write the result, or record the decision.
        """
        path = self.incoming / name
        with self.journal.deciding(name, entry.signature) as trace:
            if standing := self.outgoing.standing(name):
                needed = self._record(name, self._contents(name, entry, gate), gate)
                if standing.verdict != "corrected":
                    needed |= self.sets.refusal_record(name)
                if standing.holds(needed):
                    self.outgoing.keep_only(name, standing.verdict)
                    self._to_quarantine(name, dict(standing.record))
                    return standing.verdict
            with gate.decision(path) as decision:
                decision.is_repeated = entry.failures > 0
                verdict, line = self._deliver(name, entry, gate, decision, trace)
            if line:  # once it is recorded
                self.tell(line)
            if verdict not in (TOO_EARLY, "corrected"):
                standing = self.outgoing.standing(name)
                self._to_quarantine(name, dict(standing.record) if standing else {})
            return verdict

    def _contents(self, name: str, entry: Entry, gate: Gate, read: Mapping[str, str] | None = None) -> dict[str, str]:
        """Hash an upload but for the files that were ``read``, and hashed then; see `contents_of`."""
        if not is_presentable(name):
            return {}
        return contents_of(self.incoming / name, entry.signature, gate.verifier is not None, read)

    def _record(self, name: str, contents: Mapping[str, str], gate: Gate) -> dict[str, Any]:
        """Return what a result is made of."""
        return {
            "input_sha256": content_sha256(contents),
            "made_by": gate.fingerprint,
            "base_model": self.base_model_identity,
            **self.sets.record(name),
        }

    def _deliver(self, name: str, entry: Entry, gate: Gate, decision: OpenDecision, trace: Trace) -> tuple[str, str]:
        """Do all of a decision but record it; return the verdict, and a line that says what was done."""
        path = self.incoming / name
        found = self._read(path, entry.signature, decision)
        if isinstance(found, InputError) and entry.wait < self.options.patience:
            self._wait_for(name, entry, found)
            return TOO_EARLY, ""
        contents = self._contents(name, entry, gate, found.files if isinstance(found, Adapter) else None)
        if decision.inputs is None:
            decision.inputs = {file: sha256 for file, sha256 in contents.items() if not sha256.startswith("kind")}
        record = self._record(name, contents, gate)
        if signature_of(path) != entry.signature:
            return TOO_EARLY, ""
        try:
            if isinstance(found, Exception):
                raise found
            corrected, report = decision.correct(found)
            trace.intends(gate.closed(decision))
            totals = report.totals
            figures = {
                "adapter_sha256": decision.adapter_sha256,
                "largest_undo": totals.largest_undo,
                "largest_undo_after": totals.largest_undo_after,
                "relative_change": totals.relative_change,
            }
            document = record | figures | {"decision": decision.id}
            with self.sets.admitting(name, corrected, gate):
                outputs = self.outgoing.publish(name, corrected, document, gate.seal_for(found))
        except (OSError, LogError):
            raise
        except Exception as error:  # also a bug of ours: it must neither stop the guard nor let the adapter through
            return self._refuse(name, error, gate, decision, trace, record)
        decision.delivered(outputs)
        return "corrected", f"{name}: corrected, {report.warning}relative change {report.totals.relative_change:.1%}"

    def _refuse(
        self,
        name: str,
        error: Exception,
        gate: Gate,
        decision: OpenDecision,
        trace: Trace,
        record: dict[str, Any],
    ) -> tuple[str, str]:
        trace.intends(gate.closed(decision, error))
        document = record | self.sets.refusal_record(name) | refusal_of(name, error) | {"decision": decision.id}
        if self.quarantine:
            document |= {"quarantined": str(self.quarantine.place(name, decision.id))}
        self.outgoing.refuse(name, document)
        decision.refuse(error)
        return verdict_of(error), f"{name}: refused: {error}"

    def withdraw(self, name: str, gate: Gate) -> None:
        """Take away what was made of an upload that is gone, and record that; raises OSError, LogError."""
        standing = self.outgoing.standing(name)
        sha256 = standing.record.get("adapter_sha256") if standing else None
        decision = gate.withdrawn(self.incoming / name, sha256)
        with self.journal.deciding(name, ()) as trace:
            trace.intends(decision)
            self.outgoing.clear(name)
            try:
                gate.log.record(decision)
            except LogError:
                trace.keep()  # it took effect, and is recorded when that is possible again
                raise
        self.tell(f"{name}: withdrawn, as it is no longer in {self.incoming}")

    def undecided(self, name: str, error: Exception) -> None:
        """Leave the reason why this machine could not decide, and nothing that nobody recorded."""
        with suppress(Exception):
            if isinstance(error, LogError):
                self.outgoing.take_away(name)
            # Without what makes a record that holds: it is decided on again.
            self.outgoing.note(name, refusal_of(name, error))

    def _read(self, path: Path, signature: Signature, decision: OpenDecision) -> Adapter | Exception:
        try:
            if not is_presentable(path.name):
                raise UnsafeNameError(
                    f"{path}: its name is longer than {LONGEST_NAME} bytes or not printable; rename it"
                )
            check_name(path)
            if self.journal.is_hopeless(path.name, signature):
                raise ExhaustingError(
                    f"{path}: guards were killed while they read it; it may need more memory than they get"
                )
            check_files(path, signature)
            return decision.read(path, self.options.base_model)
        except Exception as error:
            error.__context__ = None
            return error.with_traceback(None)  # which holds the upload's bytes

    def _wait_for(self, name: str, entry: Entry, error: InputError) -> None:
        """Give an upload that has come to a halt its time; one that goes on is a new entry. Say so once."""
        entry.wait = self.options.patience
        if not entry.waiting:
            self.tell(f"{name}: not readable yet ({error}); waiting up to {self.options.patience:g} s")
        entry.waiting = True

    def _to_quarantine(self, name: str, record: dict[str, Any]) -> None:
        place = record.get("quarantined")
        if self.quarantine is None or not place:
            return
        try:
            self.quarantine.take(self.incoming / name, Path(place), record)
        except (OSError, InputError) as error:
            self.tell(
                f"{name}: stays in {self.incoming} until the next start, as it cannot be moved to {place}: {error}"
            )


def refusal_of(name: str, error: Exception) -> dict[str, str]:
    """Return what a refusal says."""
    return {
        "adapter": printable(name),
        "verdict": verdict_of(error),
        "reason_code": reason_code_of(error),
        "reason": printable(str(error) or repr(error)),
    }
