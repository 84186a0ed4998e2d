"""What was let through, and what was not: a JSON line per decision, which `decision.schema.json` describes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from csulora import __version__
from csulora.adapters.expert_encoding import Layout
from csulora.adapters.lora import Format
from csulora.errors import LogError, printable
from csulora.io.files import parse_json, sha256_of_file
from csulora.native import _core
from csulora.serving import metrics

Verdict = Literal["corrected", "refused", "invalid", "failed", "withdrawn"]
Route = Literal["guard", "peft", "vllm", "sglang", "llama.cpp", "python"]

_SEARCHED = 16 << 20  # bytes at the end of a log in which a decision is looked for


@dataclass(frozen=True)
class Form:
    """What else than adapter, subspaces and policy decides on the bytes of an output.

    Attributes:
        format: of the file, as `csulora.save_adapter` takes it.
        layout: of experts, if another than the adapter's was asked for.
        dtype: torch's name of the type that the factors were cast to.
        fitted: whether the host's hook changed names or left out modules.
    """

    format: Format = "peft"
    layout: Layout | None = None
    dtype: str | None = None
    fitted: bool = False


@dataclass(frozen=True)
class Decision:
    """What became of one adapter that somebody wanted to load.

    Attributes:
        id: random hex digits; the guard's records and what it quarantines have it too.
        route: through which host, or ``guard`` for the directory guard, or ``python``.
        name: what the route calls the adapter; ``path``: where it came from. Both are `csulora.errors.printable`.
        inputs: name -> sha256 of each file that was read; of one that was refused, of those that were there.
        adapter_sha256: its content, see `csulora.adapters.lora.Adapter`; None if it could not be read that far.
        subspace, policy: paths; of the policy perhaps a preset's name; None for what a program holds in memory.
        subspace_sha256: of the subspace file; ``policy_sha256``: of the policy's file, else of ``policy_text``.
        policy_text: TOML document of a policy that came from no file.
        base_model: path of the model that a GGUF file is for.
        fingerprint: of subspace file, policy and version together.
        verdict: ``corrected``, ``refused`` (by a rule or the policy), ``invalid`` (malformed), ``failed`` (anything
            else that went wrong; the adapter was not loaded), or ``withdrawn`` (it is no longer let through).
        reason_code: why it was not corrected, see `csulora.errors`; ``reason``: the same as a sentence.
        outputs: path -> sha256 of each file that the host was given; a bare name where the file was for the host alone.
        form: what else decided on the outputs' bytes; None where there are none.
        recalled: whether the host had kept the corrected adapter, which was made earlier.
        totals: the report's totals of an adapter that was corrected, or is beyond a limit of the policy; first the
            share of it that passed uncorrected. None where it was recalled.
        seconds: time from opening the adapter to the verdict.
    """

    id: str
    route: Route
    name: str
    path: str
    inputs: Mapping[str, str]
    adapter_sha256: str | None
    subspace: str | None
    subspace_sha256: str
    policy: str | None
    policy_sha256: str
    policy_text: str | None
    base_model: str | None
    fingerprint: str
    verdict: Verdict
    reason_code: str | None
    reason: str | None
    outputs: Mapping[str, str]
    form: Form | None
    recalled: bool
    totals: Mapping[str, Any] | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the decision for JSON, with the time, the host and the versions that made it."""
        texts = {
            "name": printable(self.name),
            "path": printable(self.path),
            "reason": self.reason and printable(self.reason),
            "inputs": _printable(self.inputs),
            "outputs": _printable(self.outputs),
        }
        made = {"time": datetime.now(UTC).isoformat(), "host": socket.gethostname(), "versions": versions()}
        form = {"form": None if self.form is None else asdict(self.form)}
        return made | vars(self) | form | texts


def _printable(hashes: Mapping[str, str]) -> dict[str, str]:
    return {printable(name): sha256 for name, sha256 in hashes.items()}


@cache
def versions() -> dict[str, str]:
    """Return what computes here: csulora's and torch's version, and the sha256 of the compiled core's file."""
    return {
        "csulora": __version__,
        "core_sha256": sha256_of_file(Path(_core.__file__)),
        "torch": torch.__version__,
    }


@cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a line."""
    file = files("csulora.serving").joinpath("decision.schema.json")
    return parse_json(file.read_bytes(), Path(file.name))


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
        self.restore(decision.to_dict())

    def restore(self, document: Mapping[str, Any]) -> None:
        """Write and count what `Decision.to_dict` returned earlier, perhaps in a process that was killed since."""
        if self.path is not None:
            line = json.dumps(document, ensure_ascii=False).encode(errors="backslashreplace")
            self._append(line + b"\n")
        metrics.observe(document)

    def holds(self, identity: str) -> bool:
        """Whether one of the last lines is the decision of that id; never without a file."""
        if self.path is None:
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _SEARCHED))
                return f'"id": "{identity}"'.encode() in file.read()
        except OSError as error:
            raise LogError(f"{self.path}: cannot be read: {error}") from error

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LogError(f"{self.path}: decisions cannot be logged there: {error}") from error
        try:
            _append_line(descriptor, line, self.path)
        except OSError as error:
            raise LogError(f"{self.path}: a decision cannot be logged there: {error}") from error
        finally:
            os.close(descriptor)


def _append_line(descriptor: int, line: bytes, path: Path) -> None:
    """Append a whole line or nothing, while no other process does; what is no file cannot be shortened again."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    size = os.fstat(descriptor).st_size
    if line and stat.S_ISREG(os.fstat(descriptor).st_mode) and not _ends_with_a_line(path, size):
        line = b"\n" + line  # a power failure may have left half of one, to which nothing must be added
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _ends_with_a_line(path: Path, size: int) -> bool:
    """Whether a file of that size is empty, or its last line is complete."""
    try:
        with path.open("rb") as file:
            file.seek(max(size - 1, 0))
            return file.read(1) in (b"", b"\n")
    except PermissionError:  # who writes need not be allowed to read
        return True
