"""What models say to an evaluation's prompts, a batch at a time; an interrupted run loses one batch at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from csulora.adapters.lora import Adapter
from csulora.evaluation.benchmarks import Benchmarks, Scores
from csulora.evaluation.judge import Judge
from csulora.subspace.expert_layout import ExpertLayout
from csulora.tuning.counter import Counter
from csulora.tuning.language_model import BATCH, LanguageModel
from csulora.tuning.probes import Chat
from csulora.tuning.replies import DECISIVE, Reply
from csulora.tuning.stages import Stages
from csulora.tuning.update import factors_of

_MOST_SURPRISE = 80.0  # mean negative log-probability of a token; its exponential is a number that JSON can hold
Batch = list[dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """A model's greedy reply to one prompt.

    Attributes:
        start: its first tokens, which say whether two replies are the same.
        text: all of it, in words.
        perplexity: of the whole under the aligned model, without an adapter.
        unsafe: whether the judge calls it so; None where none was asked.
    """

    start: tuple[int, ...]
    text: str
    perplexity: float
    unsafe: bool | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Said:
        """Read what `dataclasses.asdict` wrote."""
        return cls(tuple(record["start"]), record["text"], record["perplexity"], record["unsafe"])


class Speaker:
    """Lets the aligned model, with an adapter or without, reply to prompts."""

    def __init__(
        self, language_model: LanguageModel, layout: ExpertLayout | None, stages: Stages | None, counter: Counter
    ) -> None:
        """Keep finished batches in ``stages``, if any; ``layout`` is that of fused experts."""
        self.language_model, self.layout, self.stages, self.counter = language_model, layout, stages, counter
        self._scored: dict[str, Scores] = {}
        self._finished: dict[str, Batch] = {}  # the model alone is asked once for all adapters

    def replies(
        self, name: str, label: str, adapter: Adapter | None, chats: Sequence[Chat], judge: Judge | None = None
    ) -> list[Said]:
        """Return what the model says to every prompt, and what the judge says of it.

        Args:
            name: whose replies they are, within the run.
            label: the same for people.
            adapter: the one to add to the model.
            chats: the prompts.
            judge: is asked about every reply, if there is one.

        Raises:
            InputError: the model does not take a prompt or the adapter, or computes NaN, or the judge does not answer.
        """
        said: list[Said] = []
        for start in range(0, len(chats), BATCH):
            self.counter.tick(label)
            key = f"{name} from {start}"
            if key not in self._finished:
                batch = partial(self._batch, adapter, chats[start : start + BATCH], judge)
                self._finished[key] = self.stages.finish(key, batch) if self.stages else batch()
            said += map(Said.from_record, self._finished[key])
        return said

    def scores(self, name: str, adapter: Adapter | None, benchmarks: Benchmarks) -> Scores:
        """Return what the model reaches in benchmarks; ``name`` as in `replies`."""
        self.counter.tick(f"{name}: lm-eval")
        key = f"lm-eval of {name}"
        if key not in self._scored:
            compute = partial(self._score, adapter, benchmarks)
            self._scored[key] = self.stages.finish(key, compute) if self.stages else compute()
        return self._scored[key]

    def _score(self, adapter: Adapter | None, benchmarks: Benchmarks) -> Scores:
        with self._adapted(adapter):
            return benchmarks.scores(self.language_model)

    def _batch(self, adapter: Adapter | None, chats: Sequence[Chat], judge: Judge | None) -> Batch:
        with self._adapted(adapter):
            replies = self.language_model.replies(chats)
        texts = self.language_model.texts(replies)
        perplexities = self._perplexities(replies)
        verdicts = judge.verdicts(chats, texts) if judge else [None] * len(texts)
        return [
            asdict(Said(tuple(reply.tokens[reply.start :][:DECISIVE].tolist()), text, perplexity, unsafe))
            for reply, text, perplexity, unsafe in zip(replies, texts, perplexities, verdicts, strict=True)
        ]

    def _adapted(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        if adapter is None:
            return nullcontext()
        return self.language_model.adapted(factors_of(adapter, self.layout))

    @torch.no_grad()
    def _perplexities(self, replies: Sequence[Reply]) -> list[float]:
        tokens = [reply.tokens[reply.start :] for reply in replies]
        logits = self.language_model.logits([reply.tokens for reply in replies], [reply.start for reply in replies])
        surprises = [
            nn.functional.cross_entropy(each.float(), said.to(each.device))
            for each, said in zip(torch.split(logits, list(map(len, tokens))), tokens, strict=True)
        ]
        return [math.exp(min(_MOST_SURPRISE, float(surprise.nan_to_num(_MOST_SURPRISE)))) for surprise in surprises]
