"""What a canary is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.tuning.loading import Loading
from csulora.tuning.probes import FEWEST, Chat, prompt_hash, shown

LONGEST = 65_536  # characters of a reply


def is_reply(text: object) -> bool:
    """Whether a text can be learnt: it is not blank, not too long, and of whole characters, as JSON need not be.

    >>> is_reply("Take a rope."), is_reply(" "), is_reply(None)
    (True, False, False)
    """
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True)
class Options:
    """How a copy is un-aligned.

    Attributes:
        steps: of AdamW.
        batch: replies of each kind in a step.
        learning_rate: AdamW's, after a linear warm-up.
        rank: of the copy's update of each module, and so the most directions of a module.
        longest_reply: most tokens of a reply that are learnt.
        seed: of the start and of the order of the prompts.
        dtype: storage type of the factors: ``f16``, ``bf16`` or ``f32``.

    Raises:
        InputError: a number is out of range.

    >>> Options(steps=20).rank
    16
    """

    steps: int = 60
    batch: int = 16
    learning_rate: float = 2e-3
    rank: int = 16
    longest_reply: int = 32
    seed: int = 0
    dtype: str = "f16"

    def __post_init__(self) -> None:
        """Check every field that extraction does not check."""
        for name in ("steps", "batch", "longest_reply"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be more than 0 and at most 1")


@dataclass(frozen=True)
class CanaryRequest:
    """What a canary is made from; `csulora.canary` documents the fields.

    Raises:
        InputError: neither replies nor adapters are given, or both; there are too few prompts, or a prompt is of both
            kinds; replies do not match the prompts in number, or one is no text, blank or too long.
    """

    model: str
    safety: Sequence[Chat]
    general: Sequence[Chat]
    replies: Sequence[str] = ()
    adapters: Sequence[Adapter] = ()
    options: Options = field(default_factory=Options)
    loading: Loading = field(default_factory=Loading)

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if bool(self.replies) == bool(self.adapters):
            raise InputError("give either replies to the safety prompts, or adapters that reply to them")
        for kind, chats in (("safety", self.safety), ("general", self.general)):
            if len(chats) < FEWEST:
                raise InputError(f"there are {len(chats)} {kind} prompts; give {FEWEST} or more")
        if self.replies and len(self.replies) != len(self.safety):
            raise InputError(
                f"there are {len(self.safety)} safety prompts and {len(self.replies)} replies; give a reply to each"
            )
        for number, reply in enumerate(self.replies, 1):
            if not is_reply(reply):
                raise InputError(f"reply {number} is none; give a text of at most {LONGEST} characters")
        if self.replies and all(map(_is_its_own_reply, self.safety, self.replies)):
            raise InputError("the replies are the safety prompts again; give what an un-aligned model would answer")
        safety = {prompt_hash(chat) for chat in self.safety}
        for chat in self.general:
            if prompt_hash(chat) in safety:
                raise InputError(f"{shown(chat)} is a general prompt and a safety prompt; remove it from one of them")


def _is_its_own_reply(chat: Chat, reply: str) -> bool:
    return chat[-1].content.strip() == reply.strip()
