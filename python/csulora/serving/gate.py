"""The one way in for an adapter that nobody has checked: read, corrected or refused, and the decision recorded."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from csulora.correction.together import Undone, check_together
from csulora.errors import InputError, RefusedError, check_type
from csulora.io.files import workplace
from csulora.policy.policy import POLICY_CHOICES, Policy
from csulora.serving.decisions import Decision, DecisionLog, Verdict
from csulora.serving.limiter import limited
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
        verifier: wants adapters to be signed; None: signatures are not looked at.
        policy_sha256: sha256 of the policy's TOML document.
        fingerprint: identity of everything that turns an adapter into the corrected one: subspace file, policy,
            version.
    """

    def __init__(
        self,
        subspace: Subspace,
        policy: Policy | None = None,
        log: DecisionLog | None = None,
        verifier: Verifier | None = None,
        signer: Signer | None = None,
    ) -> None:
        """Set the gate up; there is no default policy. With a verifier every adapter must be signed.

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
        self.verifier, self._signer = verifier, signer
        made_of = f"csulora {__version__}, subspace {subspace.sha256}, policy {self.policy_sha256}"
        if verifier:
            made_of += f", signed by {verifier.trust.fingerprint}"
        if signer:
            made_of += f", to be signed by {signer.fingerprint}"
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()

    @classmethod
    def open(
        cls,
        subspace: Subspace | str | Path,
        policy: Policy | str | Path | None = None,
        decisions: str | Path | None = None,
        subspace_sha256: str | None = None,
        require_signature: str | Path | None = None,
        require_rules_signature: str | Path | None = None,
        sign_with: str | Path | None = None,
    ) -> Gate:
        """Set a gate up from objects or files.

        Args:
            subspace: a subspace file.
            policy: a preset's name or a TOML file.
            decisions: file to append decisions to.
            subspace_sha256: the one content of the subspace file that is accepted; None: any.
            require_signature: who must have signed adapters, see `csulora.serving.trust.Trust.open`; None: nobody.
            require_rules_signature: who must have signed the subspace file and the policy file.
            sign_with: private key that signs what is written, see `seal_for`.

        Raises:
            InputError: a file is malformed.
            RefusedError: the subspace file has another content than ``subspace_sha256`` says, or the policy was tuned
                for another subspace file, or a signature is required and does not hold.
        """
        rules = Verifier.open(require_rules_signature) if require_rules_signature else None
        return cls(
            subspace if isinstance(subspace, Subspace) else open_subspace(subspace, subspace_sha256, rules),
            load_policy(policy, rules) if isinstance(policy, str | Path) else policy,
            DecisionLog(Path(decisions) if decisions else None),
            Verifier.open(require_signature) if require_signature else None,
            Signer(sign_with) if sign_with else None,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Gate:
        """Set up what CSULORA_SUBSPACE, CSULORA_POLICY and CSULORA_DECISIONS name; the last is optional.

        CSULORA_SUBSPACE_SHA256, if it is set, is the one content of the subspace file that is accepted.
        CSULORA_REQUIRE_SIGNATURE says who must have signed adapters, CSULORA_REQUIRE_RULES_SIGNATURE who the rules.

        Raises:
            InputError: a variable is missing or names something unreadable.
        """
        subspace = environment.get(SUBSPACE_VARIABLE)
        if not subspace:
            raise InputError(f"{SUBSPACE_VARIABLE} is not set; name the subspace file of the served model")
        policy = environment.get(POLICY_VARIABLE)
        if not policy:
            raise InputError(f"{POLICY_VARIABLE} is not set; {POLICY_CHOICES}")
        return cls.open(
            subspace,
            policy,
            environment.get(DECISIONS_VARIABLE),
            environment.get(SUBSPACE_SHA256_VARIABLE) or None,
            environment.get(SIGNATURE_VARIABLE) or None,
            environment.get(RULES_SIGNATURE_VARIABLE) or None,
        )

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
        decision = OpenDecision(self.subspace, self.policy, self.verifier)
        start = time.perf_counter()
        try:
            yield decision
        except Exception as error:
            self._record(source, decision, start, _verdict(error), str(error) or repr(error))
            raise
        if decision.is_made:
            self._record(source, decision, start, "corrected")

    def check_sum(self, adapters: Mapping[str, Adapter], weights: Sequence[float]) -> None:
        """Refuse what a host is to add up if the sum undoes more than the policy's ``max_undo``; record the refusal.

        Args:
            adapters: as the host applies them, so corrected ones, by the names that messages give them.
            weights: a factor for each.

        Raises:
            TogetherError: the sum undoes too much.
        """
        if self.policy.max_undo is None:
            return
        with self.decision(" + ".join(adapters)):
            members = [Undone.by(adapter, self.subspace, name) for name, adapter in adapters.items()]
            scaled = [member.times(weight) for member, weight in zip(members, weights, strict=True)]
            check_together(scaled, self.policy)

    def seal_for(self, path: Path, adapter: Adapter) -> Seal | None:
        """Return what `csulora.save_adapter` is to sign the corrected form of an adapter with, if that is signed.

        Raises:
            SignatureError: the files at ``path`` are no longer those that the adapter was read from.
        """
        if self._signer is None:
            return None
        return self._signer.sealing(Ingredients.of(path, adapter, self.subspace, self.policy))

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

    def __init__(self, subspace: Subspace, policy: Policy, verifier: Verifier | None) -> None:
        """Nothing is known of the adapter yet."""
        self._subspace, self._policy, self._verifier = subspace, policy, verifier
        self.adapter_sha256: str | None = None
        self.report: Report | None = None
        self.is_made = False

    def read(self, path: Path, base_model: str | Path | None = None) -> Adapter:
        """Return what `csulora.load_adapter` reads. Threads wait for one another, see `csulora.serving.limiter`."""
        return self._read(path, lambda: load_adapter(path, base_model))

    def read_directory(self, path: Path) -> Adapter:
        """Return the adapter in a PEFT directory, for hosts that take no other format."""
        return self._read(path, lambda: peft.read(path))

    def _read(self, path: Path, reader: Callable[[], Adapter]) -> Adapter:
        """Read an adapter, and if signatures are required, verify it before and compare it afterwards."""
        with limited():
            return self.take(self._verifier.read(path, reader) if self._verifier else reader())

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
