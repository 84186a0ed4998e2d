"""What the models reply to every file's prompts, and which of these replies are fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from csulora.adapters.lora import Adapter
from csulora.tuning.fit import Replies
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import Chat
from csulora.tuning.replies import Reply
from csulora.tuning.request import Request
from csulora.tuning.splits import Split
from csulora.tuning.update import factors_of


class Examples:
    """The replies to a request's prompts, computed when they are first asked for."""

    def __init__(self, request: Request, language_model: LanguageModel | None = None) -> None:
        """Take a request's prompts; ``language_model`` is its aligned model if it is loaded already."""
        self.request = request
        if language_model:
            self.language_model = language_model

    @cached_property
    def language_model(self) -> LanguageModel:
        """The aligned model."""
        return LanguageModel.open(self.request.model, self.request.loading, self.request.longest_reply)

    @cached_property
    def replies(self) -> list[Replies]:
        """Per adapter, the aligned model's replies to safety prompts, and its own, uncorrected, to the others."""
        self.language_model.check_lengths([chat for chats in self.request.files for chat in chats])
        safety = self.language_model.replies(self.request.safety)
        every = zip(self.request.adapters, self.request.task, strict=True)
        return [
            Replies(safety, *(self._own_replies(adapter, chats) for chats in (task, self.request.general)))
            for adapter, task in every
        ]

    @cached_property
    def general(self) -> list[Reply]:
        """The aligned model's replies to general prompts."""
        return self.language_model.replies(self.request.general)

    def prepare(self) -> None:
        """Compute all replies that measurements need."""
        for number in range(len(self.replies)):
            self.part(number)
        self.general_part()

    def part(self, number: int, *splits: Split) -> Replies:
        """Return an adapter's replies to the prompts in some splits."""
        replies, request = self.replies[number], self.request
        return Replies(
            self._chosen(replies.safety, request.safety, splits),
            self._chosen(replies.task, request.task[number], splits),
            self._chosen(replies.general, request.general, splits),
        )

    def general_part(self, *splits: Split) -> list[Reply]:
        """Return the aligned model's replies to the general prompts in some splits."""
        return self._chosen(self.general, self.request.general, splits)

    def _chosen(self, replies: Sequence[Reply], chats: Sequence[Chat], splits: Sequence[Split]) -> list[Reply]:
        """Return a file's replies to its prompts in some splits, one split after the other."""
        positions = (self.request.splits.positions(chats, split) for split in splits)
        return [replies[position] for every in positions for position in every]

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[None]:
        """Add an adapter to the aligned model while the context lasts."""
        with self.language_model.adapted(factors_of(adapter, self.request.subspace.provenance.experts)):
            yield

    def _own_replies(self, adapter: Adapter, chats: Sequence[Chat]) -> list[Reply]:
        with self.adapted(adapter):
            return self.language_model.replies(chats)
