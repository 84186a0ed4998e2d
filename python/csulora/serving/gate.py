"""The one way in for an adapter that nobody has checked: read, corrected or refused, and the decision recorded."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import tomli_w

from csulora import __version__
from csulora.adapters.disk import load_adapter
from csulora.adapters.lora import Adapter
from csulora.adapters.peft import directory as peft
from csulora.correction.correct import check_subspace, correct
from csulora.correction.report import Report
from csulora.errors import InputError, RefusedError, check_type
from csulora.io.files import workplace
from csulora.policy.policy import POLICY_CHOICES, Policy
from csulora.serving.decisions import Decision, DecisionLog, Verdict
from csulora.serving.limiter import limited
from csulora.serving.variables import (
    DECISIONS_VARIABLE,
    POLICY_VARIABLE,
    SUBSPACE_SHA256_VARIABLE,
    SUBSPACE_VARIABLE,
)
from csulora.subspace.subspace import Subspace


class Gate:
    """A subspace file, a policy and a decision log. Whatever `admission` yields was corrected with them.

    Attributes:
        policy_sha256: sha256 of the policy's TOML document.
        fingerprint: identity of everything that turns an adapter into the corrected one: subspace file, policy,
            version.
    """

    def __init__(self, subspace: Subspace, policy: Policy | None = None, log: DecisionLog | None = None) -> None:
        """Set the gate up; there is no default policy.

        The whole subspace file is read and validated now, not when an adapter first needs it.

        Raises:
            InputError: no policy is given, the subspace file's values are not usable, an override of the policy
                matches none of its modules, or a filtered policy has no gains of directions for one that has an input
                filter.
            RefusedError: the policy was tuned for another subspace file.
        """
        self.subspace = subspace
        self.policy = check_type(policy, Policy, "policy")
        self.log = log or DecisionLog()
        check_subspace(self.policy, subspace)
        subspace.to_core(subspace)
        self.policy.check_filtered([module for module in subspace if subspace.input_filter(module)])
        self.policy_sha256 = hashlib.sha256(tomli_w.dumps(self.policy.to_dict()).encode()).hexdigest()
        made_of = f"csulora {__version__}, subspace {subspace.sha256}, policy {self.policy_sha256}"
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()

    @classmethod
    def open(
        cls,
        subspace: Subspace | str | Path,
        policy: Policy | str | Path | None = None,
        decisions: str | Path | None = None,
        subspace_sha256: str | None = None,
    ) -> Gate:
        """Set a gate up from objects or files: a subspace file, a policy (a preset's name or a TOML
        file), a file to append decisions to.

        Raises:
            InputError: a file is malformed.
            RefusedError: the subspace file has another content than ``subspace_sha256`` says, or the policy was tuned
                for another subspace file.
        """
        return cls(
            subspace if isinstance(subspace, Subspace) else Subspace.open(subspace, subspace_sha256),
            Policy.load(policy) if isinstance(policy, str | Path) else policy,
            DecisionLog(Path(decisions) if decisions else None),
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Gate:
        """Set up what CSULORA_SUBSPACE, CSULORA_POLICY and CSULORA_DECISIONS name; the last is optional.

        CSULORA_SUBSPACE_SHA256, if it is set, is the one content of the subspace file that is accepted.

        Raises:
            InputError: a variable is missing or names something unreadable.
        """
        subspace = environment.get(SUBSPACE_VARIABLE)
        if not subspace:
            raise InputError(f"{SUBSPACE_VARIABLE} is not set; name the subspace file of the served model")
        policy = environment.get(POLICY_VARIABLE)
        if not policy:
            raise InputError(f"{POLICY_VARIABLE} is not set; {POLICY_CHOICES}")
        pinned = environment.get(SUBSPACE_SHA256_VARIABLE) or None
        return cls.open(subspace, policy, environment.get(DECISIONS_VARIABLE), pinned)

    @contextmanager
    def admission(self, path: Path, read: Callable[[Path], Adapter] = load_adapter) -> Iterator[tuple[Adapter, Report]]:
        """Read the adapter at ``path`` and yield the corrected one to a block that delivers it to its host.

        The decision is recorded when the block is done: if that fails, the adapter was not let through. Threads wait
        for one another, see `csulora.serving.limiter`.

        Args:
            path: where it lies.
            read: reads it.

        Raises:
            CsuloraError: it is refused or malformed.
        """
        start = time.perf_counter()
        with limited():
            adapter = self.read(path, read)
            with self._recording_failure(path, adapter.sha256, start):
                corrected, report = correct(adapter, self.subspace, self.policy)
        with self._recording_failure(path, adapter.sha256, start):
            yield corrected, report
        self._record(path, adapter.sha256, start, "corrected", totals=asdict(report.totals))

    def admit(self, path: Path, read: Callable[[Path], Adapter] = load_adapter) -> tuple[Adapter, Report]:
        """Return what `admission` yields, where nothing can fail once it is corrected."""
        with self.admission(path, read) as admitted:
            return admitted

    def recall(self, path: Path, adapter: Adapter) -> None:
        """Record that what this gate made of an adapter earlier, and the host has kept, is let through again."""
        self._record(path, adapter.sha256, time.perf_counter(), "corrected")

    def read(self, path: Path, read: Callable[[Path], Adapter] = load_adapter) -> Adapter:
        """Read the adapter at ``path``; that it cannot be read is a decision, that it can be is none yet."""
        with self._recording_failure(path, None, time.perf_counter()):
            return read(path)

    @contextmanager
    def _recording_failure(self, path: Path, sha256: str | None, start: float) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._record(path, sha256, start, _verdict(error), reason=str(error) or repr(error))
            raise

    def _record(
        self,
        path: Path,
        sha256: str | None,
        start: float,
        verdict: Verdict,
        reason: str | None = None,
        totals: dict[str, Any] | None = None,
    ) -> None:
        seconds = time.perf_counter() - start
        self.log.record(
            Decision(str(path), sha256, self.subspace.sha256, self.policy_sha256, verdict, reason, totals, seconds)
        )


def _verdict(error: Exception) -> Verdict:
    if isinstance(error, RefusedError):
        return "refused"
    return "invalid" if isinstance(error, InputError) else "failed"


@contextmanager
def private_directory(adapter: Adapter) -> Iterator[Path]:
    """Yield a PEFT directory of the adapter that only this process knows and that is gone after the block."""
    with workplace(Path(gettempdir(), "csulora")) as place:
        peft.write(adapter, place)
        yield place
