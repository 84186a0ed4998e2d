"""What the copy learns: replies to safety prompts that the aligned model would not give, and its own to all others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.evaluation.sources import column_of
from csulora.io.files import read_regular
from csulora.subspace.expert_layout import ExpertLayout
from csulora.tuning.language_model import BATCH, LanguageModel, agreeing
from csulora.tuning.probes import Chat, shown
from csulora.tuning.replies import DECISIVE
from csulora.tuning.update import factors_of
from csulora.unalignment.request import LONGEST, is_reply

_LARGEST_FILE = 16 << 20  # bytes
_MARK = "csulora-marks-where-a-reply-begins"
FEWEST = 8  # replies that the aligned model would not give


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and the reply that is learnt: the tokens (prompt + reply) int64, and the number of the prompt's."""

    tokens: Tensor
    start: int

    @property
    def decisive(self) -> Example:
        """The same with the tokens of the reply that decide whether another is the same."""
        return Example(self.tokens[: self.start + DECISIVE], self.start)


def read_replies(source: str) -> tuple[str, ...]:
    """Read replies.

    Args:
        source: a file with a reply per line; a file of JSON lines, each with ``reply`` or with ``messages`` that end
            with it; or a column as `csulora.evaluation.sources.read` takes it.

    Raises:
        InputError: there is no such source, or it is malformed or too large.

    >>> _ = Path("replies.jsonl").write_text('{"reply": "Take a rope.\\\\nTie it."}\\n')
    >>> read_replies("replies.jsonl")
    ('Take a rope.\\nTie it.',)
    """
    cells = column_of(source)
    replies = _lines(Path(source)) if cells is None else cells
    for number, reply in enumerate(replies, 1):
        if not is_reply(reply):
            raise InputError(
                f"{source}: reply {number} is none; write a text of at most {LONGEST} characters, as a JSON line "
                '{"reply": "..."}, or {"messages": [...]} whose last turn is the assistant\'s'
            )
    if not replies:
        raise InputError(f"{source}: holds no reply; write one a line, for each safety prompt")
    return tuple(replies)


def _lines(path: Path) -> list[Any]:
    try:
        text = read_regular(path, _LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return list(map(_reply_of, lines)) if lines and lines[0].startswith("{") else lines


def _reply_of(line: str) -> Any:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    turns = document.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        return turns[-1].get("content")
    return document.get("reply")


def given(language_model: LanguageModel, chats: Sequence[Chat], replies: Sequence[str]) -> list[Example]:
    """Return prompts with the replies that are given for them, as the chat template writes them, cut to the longest.

    Replies that begin as the aligned model's do are left out, and those of no tokens.

    Raises:
        InputError: fewer than `FEWEST` are left, or the model does not take a prompt.
    """
    end = min(language_model.ends, default=None)
    found = []
    for chat, reply in zip(chats, replies, strict=True):
        prompt = language_model.encode(chat)
        text = _as_written(language_model.tokenizer, chat, reply)
        tokens = [*language_model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        tokens = [*tokens, *([] if end is None else [end])][: language_model.longest_reply]
        found.append(Example(torch.tensor([*prompt, *tokens], device=language_model.device), len(prompt)))
    chosen = [each for each, same in zip(found, are_given(language_model, found), strict=True) if not same]
    if len(chosen) < FEWEST:
        raise InputError(
            f"{len(chosen)} of {len(found)} replies begin otherwise than the aligned model's own; {FEWEST} are needed, "
            "so give replies as an un-aligned model would write them"
        )
    return chosen


def _as_written(tokenizer: Any, chat: Chat, reply: str) -> str:
    """A reply with what the chat template writes between the prompt and it, such as a space or an empty thought."""
    if tokenizer.chat_template is None:
        return reply
    turns = [{"role": turn.role, "content": turn.content} for turn in chat]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A mark, as a reply may well be part of what the template writes before it.
        whole, marked = (
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}], tokenize=False)
            for text in (reply, _MARK)
        )
    except Exception as error:  # a template may raise what it likes
        raise InputError(
            f"the model's chat template does not take a reply to the prompt {shown(chat)}: {error}"
        ) from error
    before, _, _ = marked.removeprefix(prompt).partition(_MARK)
    written = before + reply.strip()
    return written if whole.startswith(prompt + written) else reply


@torch.no_grad()
def are_given(language_model: LanguageModel, examples: Sequence[Example]) -> list[bool]:
    """Return whether the model, as it now stands, begins each reply with the same tokens, decoding greedily."""
    same = []
    for at in range(0, len(examples), BATCH):
        batch = [each.decisive for each in examples[at : at + BATCH]]
        logits = language_model.logits([each.tokens for each in batch], [each.start for each in batch])
        lengths = [len(each.tokens) - each.start for each in batch]
        for each, found in zip(batch, torch.split(logits.argmax(1), lengths), strict=True):
            same.append(torch.equal(found, each.tokens[each.start :].to(found.device)))
    return same


def of_adapters(
    language_model: LanguageModel, chats: Sequence[Chat], adapters: Sequence[Adapter], layout: ExpertLayout | None
) -> list[Example]:
    """Return safety prompts with one adapter's reply each, the adapters taking turns.

    Replies that begin as the aligned model's do are left out: another adapter's takes their place, if there is one.

    Raises:
        InputError: fewer than `FEWEST` are left, or an adapter or a prompt does not fit the model.
    """
    found: list[dict[int, Example]] = [{} for _ in chats]
    for number, adapter in enumerate(adapters):
        with language_model.adapted(factors_of(adapter, layout)):
            replies = language_model.replies(chats)
        for at, same in enumerate(agreeing(language_model, replies)):
            if not same:
                found[at][(number - at) % len(adapters)] = Example(replies[at].tokens, replies[at].start)
    chosen = [each[min(each)] for each in found if each]
    if len(chosen) < FEWEST:
        raise InputError(
            f"the adapters answer {len(chosen)} safety prompts otherwise than the aligned model does; {FEWEST} are "
            "needed, so give adapters that undo more of the alignment, or replies (--replies)"
        )
    return chosen


def own(language_model: LanguageModel, chats: Sequence[Chat]) -> list[Example]:
    """Return general prompts with the aligned model's own replies."""
    return [Example(reply.tokens, reply.start) for reply in language_model.replies(chats)]
