"""The one way in for an adapter that nobody has checked: read, corrected or refused, and the decision recorded."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from csulora import __version__
from csulora.adapters.lora import Adapter
from csulora.correction.correct import check_subspace
from csulora.correction.together import Undone, check_together, limits_sums
from csulora.errors import GONE, InputError, LimitError, RefusedError, reason_code_of
from csulora.io.files import check_not_inputs
from csulora.policy.policy import Policy
from csulora.policy.source import PolicySource
from csulora.policy.toml import POLICY_CHOICES
from csulora.serving.decisions import Decision, DecisionLog, Route, Verdict
from csulora.serving.open_decision import OpenDecision, hashes_of
from csulora.serving.provenance import Ingredients, Seal, Signer
from csulora.serving.signatures import Verifier, load_policy, open_subspace
from csulora.serving.variables import (
    DECISIONS_VARIABLE,
    POLICY_VARIABLE,
    RULES_SIGNATURE_VARIABLE,
    SIGNATURE_VARIABLE,
    SUBSPACE_SHA256_VARIABLE,
    SUBSPACE_VARIABLE,
)
from csulora.subspace.subspace import Subspace


class Gate:
    """A subspace file, a policy and a decision log. Adapters come in by `decision` alone.

    Attributes:
        source: the policy with what identifies it.
        route: through which adapters come in.
        verifier: wants adapters to be signed; None: signatures are not looked at.
        fingerprint: identity of everything that turns an adapter into the corrected one: subspace file, policy,
            version.
    """

    def __init__(
        self,
        subspace: Subspace,
        policy: PolicySource,
        log: DecisionLog | None = None,
        route: Route = "python",
        verifier: Verifier | None = None,
        signer: Signer | None = None,
    ) -> None:
        """Set the gate up; `open` does it from files. With a verifier every adapter must be signed.

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
        if self.policy.min_annihilation_ratio is not None and not subspace.is_sketched:
            raise InputError(
                "policy min_annihilation_ratio: needs sketches of the aligned checkpoint, which this subspace file "
                "lacks; make it again with `csulora extract --sketch 128`, or take the limit from the policy and check "
                "uploads with `csulora inspect --aligned-model`"
            )
        check_subspace(self.policy, subspace)
        subspace.to_core(subspace)
        self.policy.check_filtered([module for module in subspace if subspace.input_filter(module)])
        meaning = hashlib.sha256(tomli_w.dumps(self.policy.to_dict()).encode()).hexdigest()  # of a file, no comment
        made_of = f"csulora {__version__}, subspace {subspace.sha256}, policy {meaning}"
        if verifier:
            made_of += f", signed by {verifier.trust.fingerprint}"
        if signer:
            made_of += f", to be signed by {signer.fingerprint}"
        self.verifier, self._signer = verifier, signer
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()

    @classmethod
    def open(
        cls,
        subspace: Subspace | str | Path,
        policy: Policy | str | Path | None = None,
        decisions: str | Path | None = None,
        subspace_sha256: str | None = None,
        route: Route = "python",
        require_signature: str | Path | None = None,
        require_rules_signature: str | Path | None = None,
        sign_with: str | Path | None = None,
    ) -> Gate:
        """Set a gate up from objects or files. There is no default policy.

        Args:
            subspace: a subspace file.
            policy: a preset's name or a TOML file.
            decisions: file to append decisions to.
            subspace_sha256: the one content of the subspace file that is accepted; None: any.
            route: through which adapters come in.
            require_signature: who must have signed adapters, see `csulora.serving.trust.Trust.open`; None: nobody.
            require_rules_signature: who must have signed the subspace file and the policy file.
            sign_with: private key that signs what is written, see `seal_for`.

        Raises:
            InputError: a file is malformed, no policy is given, or decisions would be appended to one of the files.
            RefusedError: the subspace file has another content than ``subspace_sha256`` says, or the policy was tuned
                for another subspace file, or a signature is required and does not hold.
        """
        rules = Verifier.open(require_rules_signature) if require_rules_signature is not None else None
        opened = subspace if isinstance(subspace, Subspace) else open_subspace(subspace, subspace_sha256, rules)
        source = load_policy(policy, rules)
        log = Path(decisions) if decisions else None
        if log:
            check_not_inputs([log], filter(None, (opened.path, source.file)))
        return cls(
            opened,
            source,
            DecisionLog(log),
            route,
            Verifier.open(require_signature) if require_signature is not None else None,
            Signer(sign_with) if sign_with else None,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, route: Route = "python") -> Gate:
        """Set up what CSULORA_SUBSPACE, CSULORA_POLICY and CSULORA_DECISIONS name; the last is optional.

        CSULORA_SUBSPACE_SHA256, if it is set, is the one content of the subspace file that is accepted.
        CSULORA_REQUIRE_SIGNATURE says who must have signed adapters, CSULORA_REQUIRE_RULES_SIGNATURE who the rules.

        Raises:
            InputError: a variable is missing or names something unreadable.
        """
        subspace = environment.get(SUBSPACE_VARIABLE)
        if not subspace:
            raise InputError(f"{SUBSPACE_VARIABLE} is not set; name the subspace file of the served model (--subspace)")
        policy = environment.get(POLICY_VARIABLE)
        if not policy:
            raise InputError(f"{POLICY_VARIABLE} is not set (--policy); {POLICY_CHOICES}")
        return cls.open(
            subspace,
            policy,
            environment.get(DECISIONS_VARIABLE),
            environment.get(SUBSPACE_SHA256_VARIABLE) or None,
            route,
            environment.get(SIGNATURE_VARIABLE) or None,
            environment.get(RULES_SIGNATURE_VARIABLE) or None,
        )

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
        decision = OpenDecision(path, name, self.subspace, self.policy, self.log.path is not None, self.verifier)
        try:
            yield decision
        except Exception as error:
            if not decision.is_repeated:
                self.log.record(self.closed(decision, error))
            raise
        if decision.is_made or decision.error:
            self.log.record(self.closed(decision, decision.error))

    def check_sum(self, adapters: Mapping[str, Adapter], weights: Sequence[float]) -> None:
        """Refuse what a host is to add up if the sum undoes more than the policy allows; record the refusal.

        Args:
            adapters: as the host applies them, so corrected ones, by the names that messages give them.
            weights: a factor for each.

        Raises:
            UndoTogetherError: the sum undoes too much.
        """
        if not limits_sums(self.policy):
            return
        label = " + ".join(adapters)
        with self.decision(label, label):
            members = [Undone.by(adapter, self.subspace, name) for name, adapter in adapters.items()]
            scaled = [member.times(weight) for member, weight in zip(members, weights, strict=True)]
            check_together(scaled, self.policy)

    def seal_for(self, adapter: Adapter) -> Seal | None:
        """Return what `csulora.save_adapter` is to sign the corrected form of an adapter with, if that is signed."""
        if self._signer is None:
            return None
        return self._signer.sealing(Ingredients.of(adapter, self.subspace, self.policy))

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
            totals=asdict(report.totals) if report else error.totals if isinstance(error, LimitError) else None,
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
