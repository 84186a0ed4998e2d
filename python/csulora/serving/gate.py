"""The one way in for an adapter that nobody has checked: read, corrected or refused, and the decision recorded."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from csulora import __version__
from csulora.correction.correct import check_subspace
from csulora.errors import GONE, InputError, RefusedError, reason_code_of
from csulora.policy.policy import Policy
from csulora.policy.source import PolicySource
from csulora.policy.toml import POLICY_CHOICES
from csulora.serving.decisions import Decision, DecisionLog, Route, Verdict
from csulora.serving.open_decision import OpenDecision, hashes_of
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
        source: the policy with what identifies it.
        route: through which adapters come in.
        fingerprint: identity of everything that turns an adapter into the corrected one: subspace file, policy,
            version.
    """

    def __init__(
        self, subspace: Subspace, policy: PolicySource, log: DecisionLog | None = None, route: Route = "python"
    ) -> None:
        """Set the gate up; `open` does it from files.

        The whole subspace file is read and validated now, not when an adapter first needs it.

        Raises:
            InputError: the subspace file's values are not usable, an override of the policy
                matches none of its modules, or a filtered policy has no gains of directions for one that has an input
                filter.
            RefusedError: the policy was tuned for another subspace file.
        """
        self.subspace = subspace
        self.source, self.policy, self.route = policy, policy.policy, route
        self.log = log or DecisionLog()
        if self.policy.min_annihilation_ratio is not None:
            raise InputError(
                "policy min_annihilation_ratio: needs the aligned checkpoint's weights, which a server's hook and the "
                "guard do not read; take it from the policy, and check uploads with `csulora inspect --aligned-model`"
            )
        check_subspace(self.policy, subspace)
        subspace.to_core(subspace)
        self.policy.check_filtered([module for module in subspace if subspace.input_filter(module)])
        meaning = hashlib.sha256(tomli_w.dumps(self.policy.to_dict()).encode()).hexdigest()  # of a file, no comment
        made_of = f"csulora {__version__}, subspace {subspace.sha256}, policy {meaning}"
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()

    @classmethod
    def open(
        cls,
        subspace: Subspace | str | Path,
        policy: Policy | str | Path | None = None,
        decisions: str | Path | None = None,
        subspace_sha256: str | None = None,
        route: Route = "python",
    ) -> Gate:
        """Set a gate up from objects or files: a subspace file, a policy (a preset's name or a TOML
        file), a file to append decisions to. There is no default policy.

        Raises:
            InputError: a file is malformed, or no policy is given.
            RefusedError: the subspace file has another content than ``subspace_sha256`` says, or the policy was tuned
                for another subspace file.
        """
        return cls(
            subspace if isinstance(subspace, Subspace) else Subspace.open(subspace, subspace_sha256),
            PolicySource.load(policy),
            DecisionLog(Path(decisions) if decisions else None),
            route,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, route: Route = "python") -> Gate:
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
        return cls.open(subspace, policy, environment.get(DECISIONS_VARIABLE), pinned, route)

    @contextmanager
    def decision(self, path: str | Path, name: str | None = None) -> Iterator[OpenDecision]:
        """Decide about one adapter: the block reads it, corrects it, and delivers it to its host.

        The decision is recorded once, when the block is done. It is "corrected" only if the whole block succeeded.
        A block that corrects nothing, refuses nothing and raises nothing has decided nothing.

        Args:
            path: where the adapter came from.
            name: what the log calls it; None: the path's last part.

        >>> with csulora.serving.gate.Gate.open(subspace, "protect").decision(adapter) as decision:
        ...     corrected, report = decision.correct(decision.read(adapter))
        >>> report.totals.undo_after < report.totals.undo
        True
        """
        decision = OpenDecision(path, name, self.subspace, self.policy, self.log.path is not None)
        try:
            yield decision
        except Exception as error:
            if not decision.is_repeated:
                self.log.record(self.closed(decision, error))
            raise
        if decision.is_made or decision.error:
            self.log.record(self.closed(decision, decision.error))

    def closed(self, decision: OpenDecision, error: Exception | None = None) -> Decision:
        """Return the record of what a block under `decision` has done so far, or of why it lets nothing through."""
        report = decision.report if error is None else None
        inputs = decision.inputs
        if inputs is None:
            inputs = {} if self.log.path is None else hashes_of(decision.path)
        return Decision(
            **self._rules(),
            id=decision.id,
            name=decision.name,
            path=str(decision.path.absolute() if os.path.lexists(decision.path) else decision.path),
            inputs=inputs,
            adapter_sha256=decision.adapter_sha256,
            base_model=decision.base_model,
            verdict="corrected" if error is None else verdict_of(error),
            reason_code=None if error is None else reason_code_of(error),
            reason=None if error is None else str(error) or repr(error),
            outputs=decision.outputs if error is None else {},
            form=decision.form if error is None else None,
            recalled=decision.is_recalled and error is None,
            totals=asdict(report.totals) if report else None,
            seconds=time.perf_counter() - decision.started,
        )

    def withdrawn(self, path: Path, adapter_sha256: str | None) -> Decision:
        """Return the record of a withdrawal: the adapter left the directory that it was uploaded to."""
        return Decision(
            **self._rules(),
            id=secrets.token_hex(8),
            name=path.name,
            path=str(path),
            inputs={},
            adapter_sha256=adapter_sha256,
            base_model=None,
            verdict="withdrawn",
            reason_code=GONE,
            reason=f"{path}: is no longer there, so what was made of it was taken away",
            outputs={},
            form=None,
            recalled=False,
            totals=None,
            seconds=0.0,
        )

    def _rules(self) -> dict[str, Any]:
        """Return the fields of a decision that say by what it was made."""
        return {
            "route": self.route,
            "subspace": None if self.subspace.path is None else str(self.subspace.path.absolute()),
            "subspace_sha256": self.subspace.sha256,
            "policy": self.source.name,
            "policy_sha256": self.source.sha256,
            "policy_text": self.source.text,
            "fingerprint": self.fingerprint,
        }


def verdict_of(error: Exception) -> Verdict:
    """Return the verdict on an adapter that an error keeps from being let through."""
    if isinstance(error, RefusedError):
        return "refused"
    return "invalid" if isinstance(error, InputError) else "failed"
