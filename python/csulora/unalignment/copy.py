"""The copy: the aligned model with a low-rank update of each linear layer, which exists in memory alone."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from csulora.errors import InputError, RefusedError
from csulora.models.checkpoint import Checkpoint
from csulora.models.names import parse_expert, with_known_projection
from csulora.models.rounding import RoundingVariances
from csulora.subspace.input_filter import Factors
from csulora.tuning.expert_modules import is_experts
from csulora.tuning.language_model import LanguageModel
from csulora.unalignment.examples import Example, are_given
from csulora.unalignment.request import Options

_WARMUP = 10  # steps
_LARGEST_GRADIENT = 1.0  # norm

Tick = Callable[[int, float], None]
"""Called before each step with its number, and the seconds that the last one took."""


def start(
    language_model: LanguageModel, checkpoint: Checkpoint, modules: Sequence[str], options: Options
) -> dict[str, Factors]:
    """Return updates b a of the modules that the model computes with, by names in memory: b zeros, a random.

    ``modules`` are named as on disk. Those that the model lacks, as an image tower, have none.
    """
    generator = torch.Generator().manual_seed(options.seed)
    factors = {}
    for module, name in _names_in_memory(checkpoint, modules).items():
        if not _takes_update(language_model, name):
            continue
        rows, columns = checkpoint.weights[module].shape
        rank, device = min(options.rank, rows, columns), language_model.device_of(name)
        a = (2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5
        factors[name] = torch.zeros(rows, rank, device=device), a.to(device)
    return factors


def _names_in_memory(checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, str]:
    """Return what updates of modules are called, by their names on disk."""
    in_memory = {module: name for name, module in checkpoint.names_in_memory.items()}
    return {module: with_known_projection(in_memory.get(module, module)) for module in modules}


def _takes_update(language_model: LanguageModel, name: str) -> bool:
    expert = parse_expert(name)
    with suppress(InputError, RefusedError):
        module = language_model.module(expert[0] if expert else name)
        return is_experts(module) if expert else isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return False


def unalign(
    language_model: LanguageModel,
    factors: dict[str, Factors],
    attacks: Sequence[Example],
    general: Sequence[Example],
    options: Options,
    tick: Tick = lambda step, seconds: None,
) -> dict[str, Factors]:
    """Train updates on as many attacks as general examples, and return them; the model itself does not change."""
    parameters = [factor.requires_grad_() for each in factors.values() for factor in each]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / _WARMUP))
    draws = [_draws(kind, options, number) for number, kind in enumerate((attacks, general))]
    begun, seconds = time.perf_counter(), 0.0
    for step in range(options.steps):
        tick(step, seconds)
        batch = [example for kind in draws for example in next(kind)]
        optimizer.zero_grad()
        with language_model.adapted(factors):
            _loss(language_model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        begun, seconds = time.perf_counter(), time.perf_counter() - begun
    return {name: (b.detach(), a.detach()) for name, (b, a) in factors.items()}


def _loss(language_model: LanguageModel, batch: Sequence[Example]) -> Tensor:
    logits = language_model.logits([each.tokens for each in batch], [each.start for each in batch])
    wanted = torch.cat([each.tokens[each.start :] for each in batch])
    return nn.functional.cross_entropy(logits.float(), wanted.to(logits.device))


def _draws(examples: Sequence[Example], options: Options, number: int) -> Iterator[list[Example]]:
    """Yield batches, every example once before any comes again."""
    order = random.Random(f"{options.seed} {number}")
    waiting: list[Example] = []
    size = min(options.batch, len(examples))
    while True:
        if len(waiting) < size:
            waiting += order.sample(list(examples), len(examples))
        yield waiting[:size]
        waiting = waiting[size:]


def learnt(language_model: LanguageModel, factors: dict[str, Factors], examples: Sequence[Example]) -> float:
    """Return the share of replies that the copy would begin with the same tokens, decoding greedily."""
    with language_model.adapted(factors):
        return sum(are_given(language_model, examples)) / len(examples)


class ExactCheckpoint(Checkpoint):
    """A checkpoint whose weights are taken for what they are: to a copy of it, its rounding is no noise."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read what another checkpoint reads."""
        super().__init__(checkpoint.name, checkpoint.files, checkpoint.config, checkpoint.weights, checkpoint._others)

    def load(self, module: str) -> tuple[Tensor, str]:
        """Return one weight in float32, and the sha256 of what is stored."""
        weight, sha256 = super().load(module)
        return weight.float(), sha256

    def rounding_variances(self, module: str) -> RoundingVariances | None:
        """Return None: nothing was rounded since."""
        return None


class CopyCheckpoint(ExactCheckpoint):
    """The copy as a checkpoint: the aligned weights plus the update, one matrix at a time and never on disk."""

    def __init__(self, aligned: Checkpoint, factors: dict[str, Factors]) -> None:
        """Take the updates by the modules' names in memory."""
        super().__init__(aligned)
        self.name = f"an un-aligned copy of {aligned.name}"
        names = _names_in_memory(aligned, aligned.weights)
        self._factors = {module: factors[name] for module, name in names.items() if name in factors}

    def load(self, module: str) -> tuple[Tensor, str]:
        """Return one weight in float32, and the sha256 of its bytes."""
        weight, sha256 = super().load(module)
        if module not in self._factors:
            return weight, sha256
        b, a = (factor.cpu() for factor in self._factors[module])
        weight = torch.addmm(weight, b, a)
        return weight, hashlib.sha256(weight.numpy().data).hexdigest()
