"""What other rules would do to every upload, without doing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from csulora.adapters.disk import load_adapter
from csulora.correction.correct import correct
from csulora.errors import UnsafeNameError, printable, reason_code_of
from csulora.serving.gate import Gate, verdict_of
from csulora.serving.guard.outgoing import Outgoing
from csulora.serving.guard.together import PlannedSets
from csulora.serving.guard.uploads import check_files, check_name, is_presentable, is_upload, signature_of


@dataclass(frozen=True)
class Planned:
    """One upload as it stands, and as it would.

    Attributes:
        name: the upload's.
        verdict_now: what OUTGOING holds for it; None if nothing.
        verdict: what the rules would make of it.
        undo: largest share of a module's alignment that the upload undoes; None where it would not be corrected.
        undo_now, undo_after: what is left of that in OUTGOING, and what would be.
        relative_change_now, relative_change: of the correction in OUTGOING, and of the one that would be made.
        reason_code: why it would not be corrected; ``reason``: the same as a sentence.
    """

    name: str
    verdict_now: str | None
    verdict: str
    undo: float | None = None
    undo_now: float | None = None
    undo_after: float | None = None
    relative_change_now: float | None = None
    relative_change: float | None = None
    reason_code: str | None = None
    reason: str | None = None

    @property
    def is_changed(self) -> bool:
        """Whether verdict or figures would be others than now."""
        now = (self.verdict_now, self.undo_now, self.relative_change_now)
        return now != (self.verdict, self.undo_after, self.relative_change)


def plan(
    incoming: Path,
    outgoing: Path,
    gate: Gate,
    base_model: str | Path | None = None,
    together: Sequence[str] = (),
) -> Iterator[Planned]:
    """Yield every upload in order of names; nothing is written or recorded.

    Args:
        incoming: the uploads.
        outgoing: what is published now; it need not exist.
        gate: holds the rules.
        base_model: the model that GGUF files are for.
        together: globs over names that the server adds up; see `csulora.serving.guard.together`.

    Raises:
        InputError: there are such globs, and the policy has no limit for sums.
    """
    results, sets = Outgoing(outgoing, base_model), PlannedSets(together, outgoing, base_model)
    sets.check_limit(gate.policy)
    for path in sorted(incoming.iterdir()):
        if is_upload(path):
            yield _planned(path, results, gate, base_model, sets)


def _planned(path: Path, results: Outgoing, gate: Gate, base_model: str | Path | None, sets: PlannedSets) -> Planned:
    standing = results.standing(path.name)
    record = standing.record if standing else {}
    name, verdict_now = printable(path.name), standing.verdict if standing else None
    undo_now, change_now = record.get("largest_undo_after"), record.get("relative_change")
    try:
        if not is_presentable(path.name):
            raise UnsafeNameError(f"{path}: its name is too long or not printable; rename it")
        check_name(path)
        check_files(path, signature_of(path))
        read = partial(load_adapter, path, base_model)
        adapter = gate.verifier.read(path, read) if gate.verifier else read()
        corrected, report = correct(adapter, gate.subspace, gate.policy)
        sets.admit(path.name, corrected, gate)
    except Exception as error:  # whatever it is, the guard would not let the adapter through either
        sets.refuse(path.name)
        return Planned(
            name,
            verdict_now,
            verdict_of(error),
            undo_now=undo_now,
            relative_change_now=change_now,
            reason_code=reason_code_of(error),
            reason=printable(str(error) or repr(error)),
        )
    totals = report.totals
    return Planned(
        name,
        verdict_now,
        "corrected",
        totals.largest_undo,
        undo_now,
        totals.largest_undo_after,
        change_now,
        totals.relative_change,
    )
