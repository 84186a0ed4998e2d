"""What the models reply to every file's prompts, and which of these replies are fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.tuning.fit import Replies
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import Chat
from csulora.tuning.replies import Reply
from csulora.tuning.request import Request
from csulora.tuning.splits import prompt_of, selected
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

    @cached_property
    def validation_prompts(self) -> frozenset[tuple[int, ...]]:
        """Tokens of all prompts in a validation split. A prompt in several files may be in that of one of them."""
        kinds = (kind for replies in self.replies for kind in replies.kinds)
        return frozenset(prompt_of(reply) for kind in kinds for reply in selected(kind, validation=True))

    def to_fit(self, replies: Sequence[Reply]) -> list[Reply]:
        """Return those of a file's replies that are fitted: a prompt in any validation split is excluded.

        Raises:
            InputError: none is left.
        """
        found = [
            reply for reply in selected(replies, validation=False) if prompt_of(reply) not in self.validation_prompts
        ]
        if replies and not found:
            raise InputError(
                "all of a file's prompts are in others' validation splits; give what files share in the same order"
            )
        return found

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[None]:
        """Add an adapter to the aligned model while the context lasts."""
        apart = decoded(adapter, self.request.subspace.provenance.experts)
        with self.language_model.adapted(factors_of(apart)):
            yield

    def _own_replies(self, adapter: Adapter, chats: Sequence[Chat]) -> list[Reply]:
        with self.adapted(adapter):
            return self.language_model.replies(chats)
