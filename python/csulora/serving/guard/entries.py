"""What a guard knows of INCOMING: what lies there, since when, and what is due."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from csulora.serving.guard.uploads import Signature, is_upload, signature_of

LONGEST_WAIT = 60.0  # seconds between tries
TRIES = 3  # without `watch`


@dataclass
class Entry:
    """What is known of one name in INCOMING."""

    signature: Signature
    since: float  # monotonic time at which this signature was first seen, or deciding last failed
    wait: float  # seconds from then until it is to be decided on
    decided_by: str = ""  # fingerprint of the rules by which it was
    failures: int = 0  # how often this machine failed to decide
    reason: str = ""  # of the last failure
    waiting: bool = False  # whether somebody was told that it cannot be read yet, in this content or the one before

    def is_due(self, fingerprint: str) -> bool:
        """Whether it is to be decided on now, by rules with that fingerprint."""
        return self.decided_by != fingerprint and time.monotonic() - self.since >= self.wait

    def postpone(self, reason: str) -> None:
        """Try again later; the longer, the more often that was said."""
        self.failures, self.reason = self.failures + 1, reason
        self.since, self.wait = time.monotonic(), min(2.0**self.failures, LONGEST_WAIT)

    def is_left(self, fingerprint: str) -> bool:
        """Whether a pass must go on for it."""
        return self.decided_by != fingerprint and self.failures < TRIES


class Entries(dict[str, Entry]):
    """All uploads by name, and when results were first seen to have none."""

    def __init__(self, settle: float) -> None:
        """Nothing has been seen."""
        super().__init__()
        self._settle = settle
        self._gone: dict[str, float] = {}

    def look(self, incoming: Path) -> None:
        """Take in what lies in INCOMING now; raises OSError, and changes nothing, if it cannot be listed."""
        paths = [path for path in sorted(incoming.iterdir()) if is_upload(path)]
        found = {path.name: self._looked_at(path) for path in paths}
        self.clear()
        self.update(found)

    def _looked_at(self, path: Path) -> Entry:
        signature = signature_of(path)
        known = self.get(path.name)
        if known and known.signature == signature:
            return known
        waiting = known is not None and known.waiting and not known.decided_by
        return Entry(signature, time.monotonic(), self._settle, waiting=waiting)

    def gone(self, names: Iterable[str]) -> list[str]:
        """Return those of the names without an upload that have had none long enough."""
        now = time.monotonic()
        self._gone = {name: self._gone.get(name, now) for name in names}
        return [name for name, since in self._gone.items() if now - since >= self._settle]

    @property
    def is_losing(self) -> bool:
        """Whether a name has no upload and is still there."""
        return bool(self._gone)

    def withdrawn(self, name: str) -> None:
        """Forget a name without an upload."""
        self._gone.pop(name, None)
