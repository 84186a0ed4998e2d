"""The fit: gains with which an adapter agrees with the aligned model where it should refuse, and else with itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora.tuning.gains import Gains
from csulora.tuning.language_model import BATCH, LanguageModel
from csulora.tuning.options import Options
from csulora.tuning.replies import Reply, divergences
from csulora.tuning.update import Update


@dataclass(frozen=True, eq=False)
class Replies:
    """Replies of each kind: the aligned model's to safety prompts, the uncorrected adapter's to the others."""

    safety: Sequence[Reply]
    task: Sequence[Reply]
    general: Sequence[Reply] = ()

    @property
    def kinds(self) -> tuple[Sequence[Reply], ...]:
        """Replies of each kind."""
        return self.safety, self.task, self.general


@dataclass(frozen=True, eq=False)
class Case:
    """One adapter: its update, the rows of its modules among all fitted ones, and what is fitted."""

    update: Update
    index: Tensor  # (modules) int64
    fitted: Replies


def fit(
    language_model: LanguageModel,
    cases: Sequence[Case],
    gains: Gains,
    options: Options,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the fitted parameters of ``gains``.

    Every step takes the next case, a batch of its prompts, and one step of Adam. ``tick`` is called after each. The
    learning rate falls linearly to 0: no step has to be chosen by the noise of a few prompts.
    """
    parameters = gains.start().to(language_model.device).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    draws = [_Draws(case.fitted, options, number) for number, case in enumerate(cases)]
    for step in range(options.steps):
        number = step % len(cases)
        optimizer.zero_grad()
        loss_of(language_model, cases[number], draws[number].next(), gains, parameters, options).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        tick()
    return parameters.detach()


def step_seconds(language_model: LanguageModel, case: Case, gains: Gains, options: Options) -> float:
    """Return how long a step takes: the second of two, for the first prepares what all others use."""
    taken = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        parameters = gains.start().to(language_model.device).requires_grad_()
        loss = loss_of(language_model, case, _Draws(case.fitted, options, 0).next(), gains, parameters, options)
        loss.backward()  # type: ignore[no-untyped-call]
        float(parameters.grad.sum())  # type: ignore[union-attr]  # waits for a GPU
        taken = time.perf_counter() - begun
    return taken


def loss_of(
    language_model: LanguageModel, case: Case, replies: Replies, gains: Gains, parameters: Tensor, options: Options
) -> Tensor:
    """Return what is minimised on some replies of a case: a float32 scalar in nats per token.

    Each kind of prompt counts with the mean of its divergences.
    """
    corrected = gains.correct(parameters, case.index, case.update)
    every = [reply for kind in replies.kinds for reply in kind]
    with language_model.adapted(corrected | case.update.untouched):
        found = torch.cat([_divergences(language_model, every[at : at + BATCH]) for at in range(0, len(every), BATCH)])
    loss: Tensor = options.relative_change_weight * case.update.relative_change2(corrected)
    kinds = torch.split(found, [len(kind) for kind in replies.kinds])
    for weight, kind in zip((1.0, options.task_weight, options.task_weight), kinds, strict=True):
        if len(kind):
            loss = loss + weight * kind.mean()
    return loss


def _divergences(language_model: LanguageModel, replies: Sequence[Reply]) -> Tensor:
    logits = language_model.logits([reply.tokens for reply in replies], [reply.start for reply in replies])
    return divergences(replies, logits)


class _Draws:
    """Batches of every kind of prompt, every prompt once before any comes again."""

    def __init__(self, replies: Replies, options: Options, number: int) -> None:
        self._random = random.Random(f"{options.seed} {number}")
        self._batch = options.batch
        self._kinds = replies.kinds
        self._waiting: list[list[Reply]] = [[] for _ in self._kinds]

    def next(self) -> Replies:
        return Replies(*map(self._take, range(len(self._kinds))))

    def _take(self, kind: int) -> list[Reply]:
        size = min(self._batch, len(self._kinds[kind]))
        if len(self._waiting[kind]) < size:
            self._waiting[kind] = self._random.sample(list(self._kinds[kind]), len(self._kinds[kind]))
        taken, self._waiting[kind] = self._waiting[kind][:size], self._waiting[kind][size:]
        return taken
