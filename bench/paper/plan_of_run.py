"""What a run would do, and roughly how long it would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from protocol import FRESH, HELD_OUT, OTHER, Protocol
from stages import OTHER_ADAPTER, Place
from training_data import Data, Example
from transformers import AutoConfig, AutoModelForCausalLM

from csulora.errors import InputError
from csulora.tuning.frontier import frontier_path
from csulora.tuning.language_model import BATCH
from csulora.tuning.options import Options as FitOptions

_CHARACTERS = 4.0  # of a usual token
_PROMPT = 64  # tokens of a usual prompt
_WEIGHTS_OF_TUNE = 3  # of the task prompts, where none are given
_WAYS_OF_OTHER = 4  # alone, raw, the carried policy, scaling
_FITS = 4  # `tune` fits three controls beside the policy


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, in practice.

    Attributes:
        flops: of products in training.
        bytes: of weights that are read while replies are written.
    """

    flops: float
    bytes: float


_SPEEDS = {"cuda": Speed(1e14, 1e12), "cpu": Speed(5e10, 1e10)}


@dataclass(frozen=True)
class Step:
    """A stage, whether it is done, and its cost in operations and in bytes of weights read."""

    what: str
    path: Path
    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """Return how long it takes at a speed."""
        return self.flops / speed.flops + self.bytes / speed.bytes


def size_of(model: str) -> int:
    """Return the number of a model's parameters, from its configuration alone.

    Raises:
        InputError: transformers finds no configuration.
    """
    try:
        with torch.device("meta"):
            return sum(each.numel() for each in AutoModelForCausalLM.from_config(_config(model)).parameters())
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: transformers finds no model there: {' '.join(str(error).split())}") from error


def _config(model: str) -> AutoConfig:
    found: AutoConfig = AutoConfig.from_pretrained(model)
    return found


def rows(protocol: Protocol) -> int:
    """Return in how many ways an adapter is served: alone, raw, and every candidate beside plain scaling."""
    per_count = len(protocol.penalties) + 4
    return 2 + 2 * (1 + per_count * len(protocol.directions) + 2)


def steps(protocol: Protocol, data: Data, place: Place, parameters: int) -> Iterator[Step]:
    """Yield what a run does, in order."""
    yield Step(f"extract {protocol.rank} directions per module", place.subspace, 40 * protocol.rank * 2 * parameters)
    general, safety, fresh = (len(getattr(data.evaluated, kind)) for kind in ("general", "safety", "fresh"))
    for name in (f"seed-{seed}" for seed in protocol.seeds):
        yield _training(protocol, place, name, data.task, parameters)
        fits = _FITS * (len(protocol.task_weights) or _WEIGHTS_OF_TUNE) * protocol.tune_steps
        yield _tuning(protocol, place, name, fits, parameters)
        replies = general + safety + len(data.evaluated.task)
        yield _evaluation(protocol, place, name, HELD_OUT, replies, parameters)
        if fresh:
            yield _evaluation(protocol, place, name, FRESH, 1 + fresh, parameters)
    if data.other:
        yield _training(protocol, place, OTHER_ADAPTER, data.other, parameters)
        fits = len(protocol.seeds) * (len(protocol.seeds) + 1) * protocol.tune_steps  # each left out in turn
        yield _tuning(protocol, place, OTHER_ADAPTER, fits, parameters)
        replies = general + safety + len(data.evaluated.other)
        yield _evaluation(protocol, place, OTHER_ADAPTER, OTHER, replies, parameters)


def _training(protocol: Protocol, place: Place, name: str, examples: Sequence[Example], parameters: int) -> Step:
    characters = sum(len(example.chat[-1].content) + len(example.reply) for example in examples)
    tokens = protocol.steps * protocol.batch * min(protocol.longest, characters / len(examples) / _CHARACTERS + 16)
    what = f"train {name}: {protocol.steps} steps, {tokens:,.0f} tokens"
    return Step(what, place.adapter(name), 4 * parameters * tokens)


def _tuning(protocol: Protocol, place: Place, name: str, fits: int, parameters: int) -> Step:
    tokens = fits * 2 * FitOptions.batch * (_PROMPT + protocol.tokens)
    return Step(f"tune for {name}: at most {fits:,} steps", frontier_path(place.policy(name)), 6 * parameters * tokens)


def _evaluation(protocol: Protocol, place: Place, name: str, kind: str, replies: int, parameters: int) -> Step:
    ways = _WAYS_OF_OTHER if kind == OTHER else rows(protocol)
    written, batches = ways * replies, ways * -(-replies // BATCH)
    what = f"evaluate {name}, {kind}: {ways} ways, {written:,} replies"
    path = place.evaluation(name, kind)
    return Step(what, path, 4 * parameters * written * protocol.tokens, 2 * parameters * batches * protocol.tokens)


def described(protocol: Protocol, data: Data, out: Path) -> str:
    """Return the plan of a run in words, a line for each stage.

    Raises:
        InputError: the instruct model's configuration is not to be had.
    """
    parameters = size_of(protocol.instruct)
    device = protocol.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"harmful examples": data.harmful, "task examples": data.task}
    kinds |= {"examples of another task": data.other} if data.other else {}
    kinds |= {f"{name} prompts for tune": chats for name, chats in vars(data.tuned).items() if chats}
    kinds |= {f"{name} prompts measured": chats for name, chats in vars(data.evaluated).items() if chats}
    lines = [f"{len(found):>6,} {kind}" for kind, found in kinds.items()]
    lines.append(f"{parameters / 1e9:.3g} billion parameters, {2 * parameters / 1e9:.2g} GB in 16 bits, on {device}")
    total = 0.0
    for step in steps(protocol, data, Place(out), parameters):
        seconds = 0.0 if step.path.exists() else step.seconds(_SPEEDS[device])
        total += seconds
        lines.append(f"{'done' if step.path.exists() else _minutes(seconds):>10}  {step.what}")
    lines.append(f"{_minutes(total):>10}  in all; a rough guess that may be wrong by a factor of five")
    if protocol.lm_eval:
        lines.append(f"{'':>10}  and lm-eval's {', '.join(protocol.lm_eval)} in {rows(protocol)} ways for each seed")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return "< 1 min" if seconds < 60 else f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
