"""The splits of the prompts: training is fitted, validation chooses among fits, test is for the report alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from csulora.tuning.probes import Chat, prompt_hash

STRIDE = 4  # of every four prompts of a file two are in training, one in validation, one in test


class Split(StrEnum):
    """What a prompt is for."""

    training = "training"
    validation = "validation"
    test = "test"


HELD_OUT = (Split.validation, Split.test)
_BY_POSITION = (Split.training, Split.test, Split.training, Split.validation)


class Splits:
    """The split of every prompt: the same in all files, as the first file that holds it has it."""

    def __init__(self, files: Iterable[Sequence[Chat]]) -> None:
        """Deal the prompts of each file in turn.

        >>> from csulora.tuning.probes import Message
        >>> chats = [(Message("user", text),) for text in ("one", "two", "three", "four", "five")]
        >>> splits = Splits([chats])
        >>> [splits.of(chat).value for chat in chats]
        ['training', 'test', 'training', 'validation', 'training']
        """
        self._known: dict[str, Split] = {}
        for chats in files:
            for position, chat in enumerate(chats):
                self._known.setdefault(prompt_hash(chat), _BY_POSITION[position % STRIDE])

    def of(self, chat: Chat) -> Split:
        """Return the split of a prompt."""
        return self._known[prompt_hash(chat)]

    def positions(self, chats: Sequence[Chat], split: Split) -> list[int]:
        """Return where a file's prompts of a split stand."""
        return [position for position, chat in enumerate(chats) if self.of(chat) is split]
