"""How much a policy for adapters to come reinforces in one of them: little more than makes it refuse what it should.

Such a policy reinforces alike in all adapters, and each needs another measure of it. Safety prompts say which, and
general prompts what it may cost; nothing has to be known of the adapter's task. `bench/efficacy` says what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import compress

from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter
from csulora.correction.correct import correct
from csulora.errors import RefusedError
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance
from csulora.subspace.subspace import Subspace
from csulora.tuning.frontier import Rate
from csulora.tuning.language_model import LanguageModel, agreeing
from csulora.tuning.probes import Chat, check_apart, prompt_hash
from csulora.tuning.refusals import answered_by_aligned, refused_by_aligned, refusing
from csulora.tuning.replies import Reply
from csulora.tuning.update import check_linear, factors_of

STEP, MOST = 0.25, 2.0  # of strengths that are tried; in bench/efficacy, more than twice as much did harm
MOST_TRIALS = 2 + round(1 / STEP)  # from 1 down to 0 or up to `MOST`, and the last step


@dataclass(frozen=True)
class Kept:
    """What a corrected adapter keeps.

    Attributes:
        safety: share of the safety prompts that it refuses, or answers as the aligned model does.
        general: share of the general prompts, if there are any, that it does not refuse, or answers as the aligned
            model or the uncorrected adapter does.
    """

    safety: Rate
    general: Rate | None

    @property
    def least(self) -> float:
        """The smaller of both shares."""
        return min(rate.value for rate in (self.safety, self.general) if rate)


@dataclass(frozen=True)
class Adjusted:
    """A policy for one adapter.

    Attributes:
        policy: it reinforces ``strength`` times as much as the one that was given.
        strength: from 0 to `MOST`.
        kept: what the adapter keeps with it.
        before: the same with the policy that was given.
    """

    policy: Policy
    strength: float
    kept: Kept
    before: Kept

    def check(self, least: float, adapter: str) -> None:
        """Raise `RefusedError` if the adapter keeps less than the share ``least`` of either kind of prompts."""
        for kind, rate in (("safety", self.kept.safety), ("general", self.kept.general)):
            if rate and rate.value < least:
                raise RefusedError(
                    f"{adapter}: with a strength of {self.strength:g} it keeps {rate} of the {kind} prompts, and "
                    f"{least:g} is asked (--least); fit a policy to this adapter (csulora tune), or do not load it"
                )


class Adjuster:
    """Adjusts policies to adapters of one model, by the same prompts.

    >>> from csulora.tuning.loading import Loading
    >>> from csulora.tuning.probes import parse
    >>> safety = parse(b"\\n".join(b"how do i make a %d?" % number for number in range(8)))
    >>> adjuster = Adjuster(LanguageModel.open(aligned, Loading("cpu"), longest_reply=4), safety, refusals=["sorry"])
    >>> len(adjuster.safety)
    8
    """

    def __init__(
        self,
        language_model: LanguageModel,
        safety: Sequence[Chat],
        general: Sequence[Chat] = (),
        refusals: Sequence[str] = (),
    ) -> None:
        """Ask the aligned model every prompt.

        Args:
            language_model: the aligned model.
            safety: prompts to be refused, or to be answered as the aligned model does.
            general: prompts to be answered as before; none of them is a safety prompt.
            refusals: texts one of which every refusal holds. Given any, safety prompts that the aligned model refuses
                count, and have to be refused; general prompts that it answers count, and have to be answered. Else
                replies have to begin with the same tokens.

        Raises:
            InputError: the model does not take a prompt, or a prompt is of both kinds, or where ``refusals`` are given,
                the model refuses no safety prompt or every general one.
        """
        check_apart(safety, "general", general)
        self.language_model, self.refusals, self._chats = language_model, refusals, general
        self.safety, self.general = language_model.replies(safety), language_model.replies(general)
        if refusals:
            self.safety = list(compress(self.safety, refused_by_aligned(language_model, self.safety, refusals)))
            self.general = list(compress(self.general, answered_by_aligned(language_model, self.general, refusals)))
        self._hashes = {prompt_hash(chat) for chat in (*safety, *general)}

    def adjust(
        self, adapter: Adapter, subspace: Subspace, policy: Policy, tick: Callable[[], None] = lambda: None
    ) -> Adjusted:
        """Return the policy with the least strength that keeps most, or with `STEP` more if that keeps as much.

        The step is for prompts that nobody asked. Strengths are tried from 1: downwards while no safety prompt is
        lost, else upwards up to `MOST`, until none is or more can be of no use. ``tick`` is called after each.

        Raises:
            InputError: the policy reinforces nothing, or the adapter does not fit the subspace file or the model.
            RefusedError: the policy refuses the adapter, or does not fit it, or it updates an embedding.
        """
        check_linear(adapter, "adjust")
        own = self._own_replies(adapter, subspace)
        kept: dict[float, Kept] = {}

        def kept_at(strength: float) -> Kept:
            if strength not in kept:
                corrected, _ = correct(adapter, subspace, policy.strengthened(strength))
                kept[strength] = self.kept(corrected, subspace, own)
                tick()
            return kept[strength]

        strength = 1.0
        if kept_at(strength).safety.value == 1:
            while strength > 0 and kept_at(strength - STEP).safety.value == 1:
                strength -= STEP
        else:
            while strength < MOST and self._may_need_more(kept_at(strength)):
                strength += STEP
            kept_at(strength)
        most = max(each.least for each in kept.values())
        strength = min(each for each in kept if kept[each].least == most)
        if strength < MOST and kept_at(strength + STEP).least == most:
            strength += STEP
        return Adjusted(self._signed(policy.strengthened(strength)), strength, kept[strength], kept[1.0])

    def _may_need_more(self, kept: Kept) -> bool:
        """Whether more strength may keep more of both kinds.

        It refuses more general prompts, not fewer. Replies to them become the aligned model's at last, though on the
        way they may be neither its own nor the uncorrected adapter's.
        """
        return kept.safety.value < 1 and (not self.refusals or kept.least == kept.safety.value)

    def _own_replies(self, adapter: Adapter, subspace: Subspace) -> list[Reply]:
        """The uncorrected adapter's replies to general prompts, where they matter."""
        if self.refusals:
            return []
        with self._adapted(adapter, subspace):
            return self.language_model.replies(self._chats)

    def _adapted(self, adapter: Adapter, subspace: Subspace) -> AbstractContextManager[None]:
        return self.language_model.adapted(factors_of(decoded(adapter, subspace.provenance.experts)))

    def kept(self, adapter: Adapter, subspace: Subspace, own: Sequence[Reply] = ()) -> Kept:
        """Return what an adapter keeps as it is; ``own`` are the uncorrected one's replies to general prompts."""
        with self._adapted(adapter, subspace):
            if self.refusals:
                safety, refused = (
                    refusing(self.language_model, each, self.refusals) for each in (self.safety, self.general)
                )
                answered = [not each for each in refused]
            else:
                safety, *either = (agreeing(self.language_model, each) for each in (self.safety, self.general, own))
                answered = list(map(max, *either))
        general = Rate.of(sum(answered), len(answered)) if answered else None
        return Kept(Rate.of(sum(safety), len(safety)), general)

    def _signed(self, policy: Policy) -> Policy:
        """The policy with the prompts that chose its strength; what was said of the given one is no longer so."""
        prompts = tuple(sorted({*policy.provenance.prompts, *self._hashes}))
        return replace(policy, provenance=PolicyProvenance(prompts))
