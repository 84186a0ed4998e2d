"""The one way in for an adapter that nobody has checked: read, corrected or refused, and the decision recorded."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir

import tomli_w

from csulora import __version__
from csulora.adapters.disk import load_adapter
from csulora.adapters.expert_encoding import Layout
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
    """A subspace file, a policy and a decision log. Adapters come in by `decision` alone.

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
        if self.policy.min_annihilation_ratio is not None:
            raise InputError(
                "policy min_annihilation_ratio: needs the aligned checkpoint's weights, which a server's hook and the "
                "guard do not read; take it from the policy, and check uploads with `csulora inspect --aligned-model`"
            )
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
    def decision(self, source: str | Path) -> Iterator[OpenDecision]:
        """Decide about one adapter: the block reads it, corrects it, and delivers it to its host.

        The decision is recorded once, when the block is done. It is "corrected" only if the whole block succeeded.
        A block that corrects nothing and raises nothing has decided nothing.

        Args:
            source: what the log calls the adapter: the path it came from.

        >>> with csulora.serving.gate.Gate.open(subspace, "protect").decision(adapter) as decision:
        ...     corrected, report = decision.correct(decision.read(adapter))
        >>> report.totals.undo_after < report.totals.undo
        True
        """
        decision = OpenDecision(self.subspace, self.policy)
        start = time.perf_counter()
        try:
            yield decision
        except Exception as error:
            self._record(source, decision, start, _verdict(error), str(error) or repr(error))
            raise
        if decision.is_made:
            self._record(source, decision, start, "corrected")

    def _record(
        self, source: str | Path, decision: OpenDecision, start: float, verdict: Verdict, reason: str | None = None
    ) -> None:
        self.log.record(
            Decision(
                adapter=str(source),
                adapter_sha256=decision.adapter_sha256,
                subspace_sha256=self.subspace.sha256,
                policy_sha256=self.policy_sha256,
                verdict=verdict,
                reason=reason,
                totals=asdict(decision.report.totals) if decision.report and verdict == "corrected" else None,
                seconds=time.perf_counter() - start,
            )
        )


class OpenDecision:
    """What a block under `Gate.decision` does with one adapter.

    Attributes:
        adapter_sha256: the adapter's content; None until it was read.
        report: what the correction did; None until there is one.
        is_made: whether an adapter was corrected or recalled.
    """

    def __init__(self, subspace: Subspace, policy: Policy) -> None:
        """Nothing is known of the adapter yet."""
        self._subspace, self._policy = subspace, policy
        self.adapter_sha256: str | None = None
        self.report: Report | None = None
        self.is_made = False

    def read(self, path: Path, base_model: str | Path | None = None) -> Adapter:
        """Return what `csulora.load_adapter` reads. Threads wait for one another, see `csulora.serving.limiter`."""
        with limited():
            return self.take(load_adapter(path, base_model))

    def read_directory(self, path: Path) -> Adapter:
        """Return the adapter in a PEFT directory, for hosts that take no other format."""
        with limited():
            return self.take(peft.read(path))

    def take(self, adapter: Adapter) -> Adapter:
        """Return an adapter that is in memory; the decision is about this one."""
        self.adapter_sha256 = adapter.sha256
        return adapter

    def correct(self, adapter: Adapter, layout: Layout | None = None) -> tuple[Adapter, Report]:
        """Return what `csulora.correct` makes of an adapter. Threads wait for one another."""
        with limited():
            corrected, self.report = correct(self.take(adapter), self._subspace, self._policy, layout)
        self.is_made = True
        return corrected, self.report

    def recall(self) -> None:
        """Let through again what this gate made of the adapter earlier, and the host has kept."""
        self.is_made = True


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
