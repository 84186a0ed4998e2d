"""What `csulora tune` is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from csulora import __version__
from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance
from csulora.subspace.subspace import Subspace
from csulora.tuning.inputs import ISOTROPIC, MOST_DIRECTIONS, MOST_INPUTS, TASK_WEIGHT
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.probes import Chat, check_apart, prompt_hash, shown
from csulora.tuning.splits import STRIDE, Split, Splits

# A reply is lost by one wrong token of many, which its mean divergence hardly shows; a refusal is decided by its first.
# How much more the task prompts should weigh differs from model to model (bench/efficacy); the first is tried first.
_OWN_WEIGHTS = (8.0, 2.0, 30.0)
_OTHERS_WEIGHTS = (1.0,)


@dataclass(frozen=True)
class Request:
    """What `tune` works on.

    Attributes:
        model: the aligned model, a directory or a hub id.
        adapters: for this model, fused experts taken apart; with several, one policy is fitted for all, and for others
            to come.
        subspace: the subspaces of the model pair.
        task: per adapter, prompts to be answered as the uncorrected adapter answers them.
        safety: prompts to be answered as the aligned model answers them.
        general: prompts of neither kind, if any, to be answered as the uncorrected adapter answers them; they weigh as
            much as task prompts. Of those that are not fitted, the aligned model's answer will do as well.
        for_others: whether one adapter's policy, too, is for others to come. Several adapters' always is.
        input_filters: whether a policy for adapters to come is fitted with input filters, too.
        limit_undo: whether the policy refuses adapters that undo more than each of these, see `undo_limit`; for
            adapters to come.
        keep_uncovered: what the policy lets pass of what the subspace file does not cover, see `Policy`.
        drop_uncovered: what it leaves out.
        loading: where the model runs, and in how many bits.
        longest_reply: most tokens of a reply that are looked at.
        options: of the fits.
        task_weights: what takes the place of ``options.task_weight``, one fit for each, until one keeps everything on
            the validation split. Empty: 1 where the policy is for adapters to come, else 8, 2 and 30.
        refusals: texts one of which every refusal holds, in any case of letters. Given any, `Point.refusals` says how
            often a policy refuses, and policies are chosen by that, for a refusal need not have the aligned model's
            words. Nothing is fitted to them.
        controls: whether to fit the controls and to measure every preset, to compare the fit with them.

    Raises:
        InputError: a prompt is a safety prompt and one of another kind, a file has none of a split, an adapter is
            given twice, or undo is to be limited for the one adapter that the policy is for.
    """

    model: str
    adapters: Sequence[Adapter]
    subspace: Subspace
    task: Sequence[Sequence[Chat]]
    safety: Sequence[Chat]
    general: Sequence[Chat] = ()
    for_others: bool = False
    input_filters: bool = True
    limit_undo: bool = False
    keep_uncovered: tuple[str, ...] = ()
    drop_uncovered: tuple[str, ...] = ()
    loading: Loading = field(default_factory=Loading)
    longest_reply: int = 32
    options: Options = field(default_factory=Options)
    task_weights: Sequence[float] = ()
    refusals: Sequence[str] = ()
    controls: bool = False

    def __post_init__(self) -> None:
        """Check that nothing is asked for twice, nor with its contrary."""
        layout = self.subspace.provenance.experts
        object.__setattr__(self, "adapters", tuple(decoded(adapter, layout) for adapter in self.adapters))
        self._check_prompts()
        if self.limit_undo and not self.is_for_others:
            raise InputError(
                "an adapter is never beyond a limit of its own; limit undo for adapters to come: give several, "
                "or for_others (--for-others)"
            )
        contents: set[str] = set()
        for adapter in self.adapters:
            if adapter.sha256 in contents:
                raise InputError(f"{adapter.path}: is given twice; policies are measured on adapters that are left out")
            contents.add(adapter.sha256)

    def _check_prompts(self) -> None:
        check_apart(self.safety, "task", [chat for chats in self.task for chat in chats])
        check_apart(self.safety, "general", self.general)
        for chats in self.files:
            if chats and (missing := [split for split in Split if not self.splits.positions(chats, split)]):
                raise InputError(
                    f"a file of prompts that begins with {shown(chats[0])} has none in the {missing[0]} split: other "
                    "files have the same prompts in another order; give what files share in the same order"
                )

    @property
    def files(self) -> list[Sequence[Chat]]:
        """The prompts of each file: the tasks', then safety and general prompts."""
        return [*self.task, self.safety, self.general]

    @cached_property
    def splits(self) -> Splits:
        """What every prompt is for."""
        return Splits(self.files)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the task prompts that are tried."""
        return tuple(self.task_weights) or (_OTHERS_WEIGHTS if self.is_for_others else _OWN_WEIGHTS)

    @property
    def is_for_others(self) -> bool:
        """Whether the policy is for adapters to come."""
        return self.for_others or len(self.adapters) > 1

    @property
    def policy_fields(self) -> dict[str, Any]:
        """What every policy of a run has besides its gains or penalties."""
        return {"keep_uncovered": self.keep_uncovered, "drop_uncovered": self.drop_uncovered}

    @property
    def untuned(self) -> Policy:
        """The policy that changes nothing, with what every policy of a run has."""
        return Policy.none(**self.policy_fields)

    @property
    def provenance(self) -> PolicyProvenance:
        """What a policy says that comes of this: all prompts, those that only chose it included."""
        return PolicyProvenance(tuple(sorted({prompt_hash(chat) for chats in self.files for chat in chats})))

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's results depend on."""
        kinds = (self.task, self.safety, *([self.general] if self.general else []))
        prompts = repr(kinds).encode()
        return {
            "csulora": __version__,
            "model": self.model,
            "subspace": self.subspace.sha256,
            "adapters": [adapter.sha256 for adapter in self.adapters],
            "for_others": self.is_for_others,
            "prompts": hashlib.sha256(prompts).hexdigest(),
            "keep_uncovered": list(self.keep_uncovered),
            "drop_uncovered": list(self.drop_uncovered),
            "load_in": self.loading.load_in,
            "longest_reply": self.longest_reply,
            "options": asdict(self.options),
            "task_weights": list(self.weights),
            "splits": STRIDE,
            "refusals": list(self.refusals),
            "input_filters": self.input_filters and [TASK_WEIGHT, ISOTROPIC, MOST_DIRECTIONS, MOST_INPUTS],
        }
