"""What was let through, and what was not: a JSON line per decision, and counters where the host exposes some."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from csulora.errors import InputError, printable

Verdict = Literal["corrected", "refused", "invalid", "failed"]


@dataclass(frozen=True)
class Decision:
    """What became of one adapter that somebody wanted to load.

    Attributes:
        adapter: the path it came from; the log holds it, and the reason, as `csulora.errors.printable` text.
        adapter_sha256: its content; None if it could not be read that far.
        subspace_sha256: the subspace file.
        policy_sha256: the policy, see `csulora.serving.gate`.
        verdict: ``corrected``, ``refused`` (by a rule or the policy), ``invalid`` (malformed), or ``failed``
            (anything else that went wrong; the adapter was not loaded).
        reason: why it was not corrected.
        totals: the report's totals of a corrected adapter, first the share of it that passed uncorrected; None where
            the host had kept the corrected one.
        seconds: time from opening the adapter to the verdict.
    """

    adapter: str
    adapter_sha256: str | None
    subspace_sha256: str
    policy_sha256: str
    verdict: Verdict
    reason: str | None
    totals: dict[str, Any] | None
    seconds: float


class LogError(InputError):
    """A decision cannot be written down: a fault of this machine's, whatever the adapter is."""


class DecisionLog:
    """Appends decisions to a file, a JSON object per line; several processes may share the file."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the log; without ``path`` decisions are only counted.

        Raises:
            LogError: the file cannot be written.
        """
        self.path = path
        if path is not None:
            self._append(b"")

    def record(self, decision: Decision) -> None:
        """Write and count a decision; raises `LogError` if the file cannot take it, of which it then holds nothing."""
        if self.path is not None:
            texts = {"adapter": printable(decision.adapter), "reason": decision.reason and printable(decision.reason)}
            document = {"time": datetime.now(UTC).isoformat(), **asdict(decision), **texts}
            self._append(json.dumps(document, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        _count(decision)

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LogError(f"{self.path}: decisions cannot be logged there: {error}") from error
        try:
            _append_line(descriptor, line)
        except OSError as error:
            raise LogError(f"{self.path}: a decision cannot be logged there: {error}") from error
        finally:
            os.close(descriptor)


def _append_line(descriptor: int, line: bytes) -> None:
    """Append a whole line or nothing, while no other process does; what is no file cannot be shortened again."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _count(decision: Decision) -> None:
    metrics = _metrics()
    if metrics is not None:
        decisions, seconds = metrics
        decisions.labels(verdict=decision.verdict).inc()
        seconds.inc(decision.seconds)


@cache
def _metrics() -> tuple[Any, Any] | None:
    """Counters in prometheus_client's default registry, which vLLM and most servers expose; None without it."""
    try:
        prometheus = importlib.import_module("prometheus_client")
    except ImportError:
        return None
    return (
        prometheus.Counter("csulora_decisions", "Adapters corrected or not let through", ["verdict"]),
        prometheus.Counter("csulora_decision_seconds", "Time spent on reading and correcting adapters"),
    )
