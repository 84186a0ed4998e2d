"""The splits of a file's prompts: some are fitted, the validation split stops and chooses fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from csulora.tuning.fit import Replies
from csulora.tuning.replies import Reply

Item = TypeVar("Item")

VALIDATION_STRIDE = 4  # every fourth prompt is in the validation split


def selected(every: Sequence[Item], *, validation: bool) -> list[Item]:
    """Return the items in the validation split, or the others.

    >>> selected("abcdefgh", validation=True)
    ['d', 'h']
    """
    return [each for at, each in enumerate(every) if (at % VALIDATION_STRIDE == VALIDATION_STRIDE - 1) == validation]


def validation_of(replies: Replies) -> Replies:
    """Return the replies in the validation split."""
    return Replies(*(selected(kind, validation=True) for kind in replies.kinds))


def prompt_of(reply: Reply) -> tuple[int, ...]:
    """Return the tokens of a reply's prompt."""
    return tuple(reply.tokens[: reply.start].tolist())
