"""What `csulora evaluate` is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from csulora import __version__
from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter
from csulora.correction.correct import cover
from csulora.errors import InputError, RefusedError
from csulora.evaluation.evaluation import KINDS
from csulora.evaluation.judge import Judge
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning.loading import Loading
from csulora.tuning.probes import Chat, prompt_hash, shown
from csulora.tuning.update import check_linear


@dataclass(frozen=True)
class Options:
    """How an evaluation is done.

    Attributes:
        refusals: texts one of which every refusal holds, in any case of letters; with any, refusals are counted.
        longest_reply: most tokens of a reply.
        loading: where the model runs, and in how many bits.
        incoherence: a reply is incoherent if its perplexity exceeds this multiple of what most replies of the aligned
            model and of the raw adapter to that kind of prompt have, see `csulora.evaluation.outcomes`.
        judge: is asked whether replies to safety prompts are unsafe.
        lm_eval: tasks and groups of lm-eval, or YAML files of tasks, that every model is measured on besides.
    """

    refusals: tuple[str, ...] = ()
    longest_reply: int = 32
    loading: Loading = field(default_factory=Loading)
    incoherence: float = 10.0
    judge: Judge | None = None
    lm_eval: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, and on which prompts.

    Attributes:
        model: the aligned model, a directory or a hub id.
        adapters: for this model.
        policies: by name.
        subspace: the subspaces of the model pair.
        task: per adapter, prompts to be answered as the raw adapter does.
        safety: prompts to be answered as the aligned model does.
        general: prompts of neither kind, to be answered as one of both does.
        subspaces: name of a policy -> the subspace file that it was tuned for, where that is another.
        options: how it is done.

    Raises:
        InputError: a kind of prompt is missing, given twice or made a policy or a canary; an adapter is given twice or
            is for a model of another size than the subspace file's.
        RefusedError: an adapter updates an embedding.
    """

    model: str
    adapters: Sequence[Adapter]
    policies: Mapping[str, Policy]
    subspace: Subspace
    task: Sequence[Sequence[Chat]]
    safety: Sequence[Chat]
    general: Sequence[Chat] = ()
    subspaces: Mapping[str, Subspace] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Check that adapters and prompts are what can be measured."""
        layout = self.subspace.provenance.experts
        object.__setattr__(self, "adapters", tuple(decoded(adapter, layout) for adapter in self.adapters))
        self._check_adapters()
        if not self.safety or not all(self.task):
            raise InputError("evaluate needs safety prompts, and task prompts for every adapter")
        if len(self.task) != len(self.adapters):
            raise InputError(f"{len(self.adapters)} adapters need as many kinds of task prompts, not {len(self.task)}")
        for chat in set(self.safety) & {chat for chats in self.task for chat in chats}:
            raise InputError(f"{shown(chat)} is a task prompt and a safety prompt; it can be answered in one way")
        for name, policy in self.policies.items():
            self._check_unseen(f"the policy {name!r} was tuned", policy.provenance.prompts)
            canary = self.subspace_of(name).provenance.canary
            self._check_unseen("the canary was made", (*canary.prompts, *canary.general_prompts) if canary else ())

    def prompts(self, number: int) -> dict[str, Sequence[Chat]]:
        """Return the prompts of every kind for an adapter, by its position; kinds without any are left out."""
        kinds = dict(zip(KINDS, (self.safety, self.task[number], self.general), strict=True))
        return {kind: chats for kind, chats in kinds.items() if chats}

    def subspace_of(self, policy: str) -> Subspace:
        """Return the subspaces that a policy is used with."""
        return self.subspaces.get(policy, self.subspace)

    @property
    def identity(self) -> dict[str, Any]:
        """What the replies depend on."""
        kinds = (self.task, self.safety, self.general)
        return {
            "evaluation of csulora": __version__,
            "model": self.model,
            "adapters": [adapter.sha256 for adapter in self.adapters],
            "policies": {
                name: [repr(policy.to_dict()), self.subspace_of(name).sha256] for name, policy in self.policies.items()
            },
            "prompts": hashlib.sha256(repr(kinds).encode()).hexdigest(),
            "load_in": self.options.loading.load_in,
            "longest_reply": self.options.longest_reply,
            "lm_eval": list(self.options.lm_eval),
            "judge": [judge.url, judge.model] if (judge := self.options.judge) else None,
        }

    def _check_adapters(self) -> None:
        if not self.adapters:
            raise InputError("evaluate needs an adapter")
        contents: set[str] = set()
        for adapter in self.adapters:
            if adapter.sha256 in contents:
                raise InputError(f"{adapter.path}: is given twice; leave one out")
            contents.add(adapter.sha256)
            check_linear(adapter, "evaluate")
            with suppress(RefusedError):  # what a policy does not cover stands in its row
                cover(adapter, self.subspace, Policy.none(keep_uncovered=("*",)))

    def _check_unseen(self, what: str, prompts: Collection[str]) -> None:
        """Raise `InputError` if something was made with one of the prompts, given the hashes of those that it saw."""
        seen = set(prompts)
        # Adapters may share their task prompts.
        known = [chat for chat in dict.fromkeys(self._every_prompt()) if seen and prompt_hash(chat) in seen]
        if known:
            raise InputError(
                f"{what} with {len(known)} of the prompts, {shown(known[0])} for instance; "
                "take prompts that it has not seen"
            )

    def _every_prompt(self) -> Iterator[Chat]:
        for chats in (*self.task, self.safety, self.general):
            yield from chats
