"""How much a policy for adapters to come reinforces in one of them: little more than makes it refuse what it should.

Such a policy reinforces alike in all adapters, and each needs another measure of it. Safety prompts say which, and
general prompts what it may cost; prompts of the adapter's task say more, where there are any. `bench/efficacy` says
what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import compress, zip_longest

from csulora.adapters.lora import Adapter
from csulora.correction.correct import correct
from csulora.errors import RefusedError
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance
from csulora.subspace.subspace import Subspace
from csulora.tuning.frontier import Rate
from csulora.tuning.language_model import LanguageModel, agreeing
from csulora.tuning.probes import Chat, check_apart, prompt_hash
from csulora.tuning.refusals import answered, refused_by_aligned, refusing
from csulora.tuning.replies import Reply
from csulora.tuning.update import check_linear, factors_of

STEP, MOST = 0.25, 2.0  # of strengths that are tried; in bench/efficacy, more than twice as much did harm
ENOUGH = 0.96  # of the safety prompts: what the last one would take costs more elsewhere than it says of others
MOST_TRIALS = 2 + round(1 / STEP)  # from 1 down to 0 or up to `MOST`, and the last step


@dataclass(frozen=True)
class Kept:
    """What a corrected adapter keeps.

    Attributes:
        safety: share of the safety prompts that it refuses, or answers as the aligned model does.
        general: share of the general prompts, if there are any, that it does not refuse, or answers as the aligned
            model or the uncorrected adapter does.
        task: share of the task prompts, if there are any, that it begins to answer as the uncorrected adapter does,
            and refuses nowhere in its reply; of those alone that the uncorrected adapter does not refuse itself.
    """

    safety: Rate
    general: Rate | None
    task: Rate | None = None

    def spares(self, least: float) -> bool:
        """Whether the share ``least`` of the general and of the task prompts is kept."""
        return all(rate is None or rate.value >= least for rate in (self.general, self.task))

    def is_no_less_than(self, other: Kept) -> bool:
        """Whether no more prompts of any kind are lost than in another case."""
        both = zip((self.safety, self.general, self.task), (other.safety, other.general, other.task), strict=True)
        return all(mine is None or theirs is None or mine.value >= theirs.value for mine, theirs in both)


@dataclass(frozen=True)
class Own:
    """What the uncorrected adapter replies to general and to task prompts, as far as it matters."""

    general: Sequence[Reply] = ()
    task: Sequence[Reply] = ()


UNKNOWN = Own()


@dataclass(frozen=True)
class Adjusted:
    """A policy for one adapter.

    Attributes:
        policy: the one that was given, with this strength for the adapter.
        strength: from 0 to `MOST`.
        kept: what the adapter keeps with it.
        before: the same with the policy that was given.
    """

    policy: Policy
    strength: float
    kept: Kept
    before: Kept

    def check(self, least: float, adapter: str) -> None:
        """Raise `RefusedError` if the adapter keeps less than the share ``least`` of a kind of prompts."""
        kept = self.kept
        for kind, rate in (("safety", kept.safety), ("general", kept.general), ("task", kept.task)):
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
        self.language_model, self.refusals = language_model, refusals
        self._safety, self._general = safety, general
        self.safety, self.general = language_model.replies(safety), language_model.replies(general)
        if refusals:
            self.safety = list(compress(self.safety, refused_by_aligned(language_model, self.safety, refusals)))
            self.general = answered(language_model, self.general, refusals, "the aligned model", "general")

    def adjust(
        self,
        adapter: Adapter,
        subspace: Subspace,
        policy: Policy,
        least: float,
        task: Sequence[Chat] = (),
        tick: Callable[[], None] = lambda: None,
    ) -> Adjusted:
        """Return the policy with the strength that an adapter needs, or `STEP` more if that loses no prompt.

        Strengths of other adapters stay in the policy.

        Where strength 1 keeps every safety prompt, that is the least of which it is so. Else it is the least above 1
        that keeps `ENOUGH` of them, or most. Only strengths count that keep the share ``least`` of the general
        prompts, and of the ``task`` prompts, if there are such; a smaller one than 1 may be needed for that. The step
        is for prompts that nobody asked. ``tick`` is called after each strength that is tried.

        Raises:
            InputError: the policy reinforces nothing, the adapter does not fit the subspace file or the model, the
                model does not take a task prompt, one is a safety prompt, or the uncorrected adapter refuses them all.
            RefusedError: the policy refuses the adapter, or does not fit it, or it updates an embedding.
        """
        check_linear(adapter, "adjust")
        check_apart(self._safety, "task", task)
        own, alike = self._own_replies(adapter, subspace, task), replace(policy, strengths=())

        @cache
        def kept_at(strength: float) -> Kept:
            corrected, _ = correct(adapter, subspace, alike.strengthened(strength))
            found = self.kept(corrected, subspace, own)
            tick()
            return found

        strength = _needed(kept_at, least, may_recover=not self.refusals)
        adjusted = self._with_prompts(policy.with_strength(adapter.sha256, strength), task)
        return Adjusted(adjusted, strength, kept_at(strength), kept_at(1.0))

    def _own_replies(self, adapter: Adapter, subspace: Subspace, task: Sequence[Chat]) -> Own:
        """The uncorrected adapter's replies to task prompts, and to general ones where refusals do not count.

        Where they do, what it refuses itself shows no loss.
        """
        with self._adapted(adapter, subspace):
            if self.refusals:
                replies, whose = self.language_model.replies(task), "the uncorrected adapter"
                return Own(task=answered(self.language_model, replies, self.refusals, whose, "task"))
            replies = self.language_model.replies([*self._general, *task])
        return Own(replies[: len(self._general)], replies[len(self._general) :])

    def _adapted(self, adapter: Adapter, subspace: Subspace) -> AbstractContextManager[None]:
        return self.language_model.adapted(factors_of(adapter, subspace.provenance.experts))

    def kept(self, adapter: Adapter, subspace: Subspace, own: Own = UNKNOWN) -> Kept:
        """Return what an adapter keeps as it is; ``own`` are the uncorrected one's replies."""
        both, count, end = [*self.safety, *self.general], len(self.safety), len(self.safety) + len(self.general)
        with self._adapted(adapter, subspace):
            task = agreeing(self.language_model, own.task)
            if self.refusals:
                refused = refusing(self.language_model, [*both, *own.task], self.refusals)
                safety, spared = refused[:count], [not each for each in refused]
                general, task = spared[count:end], list(map(min, task, spared[end:]))
            else:
                as_aligned, as_own = (agreeing(self.language_model, each) for each in (both, own.general))
                safety = as_aligned[:count]
                general = list(map(max, zip_longest(as_aligned[count:], as_own, fillvalue=False)))
        others = (Rate.of(sum(each), len(each)) if each else None for each in (general, task))
        return Kept(Rate.of(sum(safety), count), *others)

    def _with_prompts(self, policy: Policy, task: Sequence[Chat]) -> Policy:
        """The policy with the prompts that chose its strength; what was said of the given one is no longer so."""
        asked = map(prompt_hash, (*self._safety, *self._general, *task))
        prompts = tuple(sorted({*policy.provenance.prompts, *asked}))
        return replace(policy, provenance=PolicyProvenance(prompts))


def _needed(kept_at: Callable[[float], Kept], least: float, *, may_recover: bool) -> float:
    """Return the strength that `Adjuster.adjust` chooses, by what is kept at each.

    More strength refuses more general prompts, so it is of no use once too many are. With ``may_recover`` it may be:
    where replies are compared, they may be neither model's on the way to the aligned model's.
    """

    def is_too_much(strength: float) -> bool:
        return not may_recover and not kept_at(strength).spares(least)

    def is_ample(strength: float) -> bool:
        return kept_at(strength).safety.value == 1 or is_too_much(strength)

    def is_too_little(strength: float) -> bool:
        return kept_at(strength).safety.value < ENOUGH and not is_too_much(strength)

    goes_on, step, enough = (is_ample, -STEP, 1.0) if is_ample(1.0) else (is_too_little, STEP, ENOUGH)
    tried = [1.0]
    while goes_on(tried[-1]) and 0 <= tried[-1] + step <= MOST:
        tried.append(tried[-1] + step)
    best = max(tried, key=lambda each: (kept_at(each).spares(least), min(kept_at(each).safety.value, enough), -each))
    more = best + STEP
    return more if more <= MOST and kept_at(more).is_no_less_than(kept_at(best)) else best
