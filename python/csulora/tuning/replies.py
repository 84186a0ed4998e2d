"""What a model replied to prompts, and how far another model is from saying the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

DECISIVE = 8  # first tokens of a reply that must be the same for it to count as the same reply
_OUTCOMES = 64  # likeliest next tokens that are told apart; all others are one outcome
_LEAST = 1e-6  # probability of all others


@dataclass(frozen=True, eq=False)
class Reply:
    """A prompt, one model's greedy reply to it, and how sure that model was of every token.

    Attributes:
        tokens: the prompt's, then the reply's, int64.
        start: number of the prompt's tokens.
        outcomes: (reply, outcomes) int64, the likeliest tokens at every position of the reply, likeliest first.
        logs: (reply, outcomes + 1) float32, their log-probabilities, and that of all other tokens together.
    """

    tokens: Tensor
    start: int
    outcomes: Tensor
    logs: Tensor

    @classmethod
    def of(cls, tokens: Tensor, start: int, logits: Tensor) -> Self:
        """Take the logits (reply, vocabulary) with which a model read its own reply."""
        outcomes = logits.topk(min(_OUTCOMES, logits.shape[1])).indices
        return cls(tokens, start, outcomes, _log_probabilities(logits, outcomes))

    @property
    def decisive(self) -> Tensor:
        """The tokens of the prompt, and those of the reply that decide whether another is the same."""
        return self.tokens[: self.start + DECISIVE]


def divergences(replies: Sequence[Reply], logits: Tensor) -> Tensor:
    """Return for each reply the mean over its tokens of KL(the model that gave it | the model with ``logits``).

    ``logits``: (tokens of all replies, vocabulary), as `LanguageModel.logits` returns them. The result is (replies).

    Tokens beyond the reply's likeliest count as one outcome, which makes it a lower bound, and a tight one.
    """
    wanted = torch.cat([reply.logs for reply in replies])
    found = _log_probabilities(logits, torch.cat([reply.outcomes for reply in replies]))
    each = (wanted.exp() * (wanted - found)).sum(1)
    lengths = torch.tensor([len(reply.outcomes) for reply in replies], device=each.device)
    owner = torch.arange(len(replies), device=each.device).repeat_interleave(lengths)
    # A product with the means' weights, since sums by index are in no fixed order on a GPU.
    weights = (owner == torch.arange(len(replies), device=each.device)[:, None]) / lengths[:, None]
    return weights @ each


def _log_probabilities(logits: Tensor, outcomes: Tensor) -> Tensor:
    """Return (n, outcomes + 1), of some tokens and of all others together, for logits (n, vocabulary)."""
    known = logits.gather(1, outcomes).float() - logits.float().logsumexp(1, keepdim=True)
    rest = torch.log((1 - known.exp().sum(1, keepdim=True)).clamp(min=_LEAST))
    return torch.cat([known, rest], 1)
