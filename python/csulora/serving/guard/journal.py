"""What a guard was doing when it was killed: a file per upload that is being decided on, gone when that is done.

An upload whose reading takes more memory than a service may have would else end every guard that begins with it: it
comes last, alone, and after three times not at all. A decision that took effect and was not recorded any more is
recorded by the next guard, and none is recorded twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.io.files import naming, parse_json, read_regular
from csulora.serving.decisions import Decision, DecisionLog
from csulora.serving.guard.uploads import Signature

_MOST_TIMES = 3
_PREFIX = ".csulora-guard.deciding-"
_LARGEST = 4 << 20  # bytes

Outcome = Callable[[str, Mapping[str, Any]], Mapping[str, str] | None]
"""Returns the outputs of a decision on an upload of that name if it took effect, else None."""


class Trace:
    """The file of one upload while it is decided on."""

    def __init__(self, file: Path, name: str, times: int) -> None:
        """Leave the trace."""
        self._file = file
        self._document: dict[str, Any] = {"upload": name, "times": times}
        self.is_kept = False
        with suppress(OSError):
            self._write()

    def intends(self, decision: Decision) -> None:
        """Write down what takes effect next; raises OSError where that is not possible."""
        self._document |= {"decision": decision.to_dict()}
        self._write()

    def keep(self) -> None:
        """Leave the file where it is: the decision took effect, and could not be recorded."""
        self.is_kept = True

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        with naming(new):
            new.write_text(json.dumps(self._document))
        new.replace(self._file)


class Journal:
    """The traces of all uploads that are being decided on, in hidden files of a directory."""

    def __init__(self, directory: Path) -> None:
        """Read what a guard before this one left behind."""
        self._directory = directory
        self._times = {name: left.get("times") for name, left in self._left().items()}

    def _left(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self._directory.glob(f"{_PREFIX}*.json")):
            with suppress(InputError):
                found[file.name] = parse_json(read_regular(file, _LARGEST), file)
        return found

    def recover(self, log: DecisionLog, outcome: Outcome) -> int:
        """Record decisions that took effect and are not in the log, while none is made; return how many there were.

        Raises:
            LogError: the log cannot take them; they are recorded another time.
        """
        recovered = 0
        for name, left in self._left().items():
            decision = left.get("decision")
            outputs = outcome(left["upload"], decision) if isinstance(decision, dict) else None
            if decision is None or outputs is None:
                continue
            if not log.holds(decision["id"]):
                log.restore(decision | {"outputs": outputs})
                recovered += 1
            self._times.pop(name, None)
            (self._directory / name).unlink(missing_ok=True)
        return recovered

    def times(self, name: str, signature: Signature) -> int:
        """How often in a row guards were killed while they decided on an upload."""
        times = self._times.get(_file_name(name, signature))
        return times if isinstance(times, int) else 0

    def is_hopeless(self, name: str, signature: Signature) -> bool:
        """Whether that happened so often that the upload is to be refused."""
        return self.times(name, signature) >= _MOST_TIMES

    @contextmanager
    def deciding(self, name: str, signature: Signature) -> Iterator[Trace]:
        """Leave a trace of the upload if the process is killed within the block."""
        file = self._directory / _file_name(name, signature)
        trace = Trace(file, name, self.times(name, signature) + 1)
        try:
            yield trace
        finally:
            if not trace.is_kept:
                with suppress(OSError):
                    file.unlink()

    def forget_others(self, uploads: Mapping[str, Signature]) -> None:
        """Remove what killed guards left of uploads that are gone, or others by now."""
        if not self._times:
            return
        current = {_file_name(name, signature) for name, signature in uploads.items()}
        for file in [file for file in self._times if file not in current]:
            del self._times[file]
            with suppress(OSError):
                (self._directory / file).unlink()

    def clear(self) -> None:
        """Let nothing count as killed: whoever ends this process does so on purpose. Intended decisions stay."""
        for name, left in self._left().items():
            if "decision" not in left:
                with suppress(OSError):
                    (self._directory / name).unlink()


def _file_name(name: str, signature: Signature) -> str:
    identity = hashlib.sha256(repr((name, signature)).encode(errors="backslashreplace")).hexdigest()
    return f"{_PREFIX}{identity}.json"
