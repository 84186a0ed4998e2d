"""Examples with replies, and prompts that neither training nor `tune` has seen."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protocol import Protocol
from train import IGNORED, Encoded

from csulora.errors import InputError
from csulora.evaluation import sources
from csulora.io.files import read_regular
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import FEWEST, Chat, from_text, from_turns, prompt_hash

_LARGEST_FILE = 1 << 30  # bytes
Dealt = Mapping[str, Sequence[Chat]]  # kind -> prompts
_SEED = 0  # of the order in which examples and prompts are dealt


@dataclass(frozen=True)
class Example:
    """A chat that ends with the user's turn, and the reply to it."""

    chat: Chat
    reply: str


@dataclass(frozen=True)
class Prompts:
    """Prompts of every kind: task, safety and, where there are some, general, fresh and another task's ones."""

    task: Sequence[Chat]
    safety: Sequence[Chat]
    general: Sequence[Chat] = ()
    fresh: Sequence[Chat] = ()
    other: Sequence[Chat] = ()


@dataclass(frozen=True)
class Data:
    """Everything that a run is given, dealt so that nothing is measured on what was trained or fitted.

    Attributes:
        harmful, task: what adapters are trained on.
        other: what the adapter for another task is trained on, if there is one.
        tuned: what `tune` gets.
        evaluated: what `evaluate` gets.
    """

    harmful: Sequence[Example]
    task: Sequence[Example]
    other: Sequence[Example]
    tuned: Prompts
    evaluated: Prompts


def read(source: str) -> list[Example]:
    """Read examples: JSON lines, or two columns of a table or of a data set, named ``SOURCE#PROMPT,REPLY``.

    A line is ``{"messages": [...]}`` whose last turn is the assistant's, or ``{"prompt": ..., "reply": ...}``.

    Raises:
        InputError: there is no such source, or an example has no reply.
    """
    where, mark, columns = source.rpartition("#")
    if mark and not Path(source).exists():
        prompt, comma, reply = columns.partition(",")
        if not comma:
            raise InputError(f"{source}: name two columns: {where}#PROMPT,REPLY")
        pairs = zip(*(_cells(f"{where}#{column}") for column in (prompt, reply)), strict=True)
        records = [{"prompt": first, "reply": second} for first, second in pairs]
        return [_example(record, f"{source}: row {number}") for number, record in enumerate(records, 1)]
    lines = read_regular(Path(source), _LARGEST_FILE).decode("utf-8-sig").split("\n")
    return [_parsed(line, f"{source}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _cells(source: str) -> list[Any]:
    cells = sources.column_of(source)
    if cells is None:
        raise InputError(f"{source}: columns are of CSV or Parquet files, or of a data set (hf:ORG/NAME/SPLIT)")
    return cells


def _parsed(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: no object with "messages", or with "prompt" and "reply"')
    return _example(record, where)


def _example(record: dict[str, Any], where: str) -> Example:
    turns = record.get("messages")
    try:
        if turns is None:
            chat, reply = from_text(record.get("prompt")), record.get("reply")
        else:
            chat = from_turns(turns)
            reply = turns[-1]["content"] if turns[-1].get("role") == "assistant" else None
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error
    if not isinstance(reply, str) or not reply.strip():
        raise InputError(f"{where}: has no reply; training needs one")
    return Example(chat, reply)


def deal(protocol: Protocol) -> Data:
    """Read all sources, and deal examples and prompts in an order that is always the same.

    Raises:
        InputError: a source cannot be read, or has too few prompts that no training has seen.
    """
    harmful = read(protocol.harmful)
    task, training = _held_out(read(protocol.examples), protocol.tune_prompts + protocol.prompts)
    other, further = _held_out(read(protocol.other_examples) if protocol.other_examples else [], protocol.prompts)
    if not harmful or not training:
        raise InputError("an adapter is trained on harmful and on task examples; one of both sources has none")
    kinds = {"task": task, "other": other}
    seen = {prompt_hash(example.chat) for example in (*harmful, *training, *further)}
    for name in ("safety", "general", "fresh"):
        chats = list(sources.read(source)) if (source := protocol.sources.get(name)) else []
        random.Random(_SEED).shuffle(chats)
        kinds[name] = [chat for chat in chats if prompt_hash(chat) not in seen]
        seen |= {prompt_hash(chat) for chat in chats}
    fitted = dict.fromkeys(("task", "safety", "general"), protocol.tune_prompts)
    tuned = {name: kinds[name][:count] for name, count in fitted.items()}
    rest = {name: chats[fitted.get(name, 0) :][: protocol.prompts] for name, chats in kinds.items()}
    _check_enough(protocol, kinds, tuned, rest)
    return Data(harmful, training, further, Prompts(**tuned), Prompts(**rest))


def _held_out(examples: list[Example], count: int) -> tuple[list[Chat], list[Example]]:
    """Return prompts of at most half of the examples, and the examples that have none of these prompts."""
    different = list({prompt_hash(example.chat): example for example in examples}.values())
    random.Random(_SEED).shuffle(different)
    held = min(count, len(different) // 2)
    return [example.chat for example in different[:held]], different[held:]


def _check_enough(protocol: Protocol, kinds: Dealt, tuned: Dealt, rest: Dealt) -> None:
    """Raise `InputError` if a kind that is wanted has too few prompts to fit, or none to measure."""
    names = {"task": "examples", "other": "other_examples"}
    for name in kinds:
        source = protocol.sources.get(names.get(name, name))
        if source and (not rest[name] or len(tuned.get(name, range(FEWEST))) < FEWEST):
            raise InputError(
                f"{source}: {len(kinds[name])} {name} prompts are left that no training has seen; give more than "
                f"--tune-prompts, which is {protocol.tune_prompts}, or lower that to {FEWEST} or more"
            )


def encode(example: Example, language_model: LanguageModel, longest: int) -> Encoded:
    """Return an example in the model's chat template; the reply and its end alone bear loss."""
    tokenizer = language_model.tokenizer
    turns = [asdict(turn) for turn in example.chat]
    prompt = _tokens(tokenizer, turns, add_generation_prompt=True)
    whole = _tokens(tokenizer, [*turns, {"role": "assistant", "content": example.reply}])
    if whole[: len(prompt)] == prompt:
        reply = whole[len(prompt) :]
    else:  # a template that closes the generation prompt otherwise than it opens a reply
        reply = tokenizer(example.reply, add_special_tokens=False).input_ids
    end = next((at for at, token in enumerate(reply) if token in language_model.ends), None)
    reply = reply[: end + 1] if end is not None else [*reply, min(language_model.ends)]
    tokens = (prompt + reply)[-longest:]
    return Encoded(tokens, ([IGNORED] * len(prompt) + reply)[-longest:])


def _tokens(tokenizer: Any, turns: Sequence[dict[str, str]], **options: bool) -> list[int]:
    found: list[int] = tokenizer.apply_chat_template(turns, return_dict=False, **options)
    return found
