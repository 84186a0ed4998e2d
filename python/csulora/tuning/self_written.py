"""General prompts that the aligned model writes itself, where nobody has any.

The model continues its chat template from where a user's turn begins, after its own system prompt. Each turn begins
with a given word: a model that was tuned narrowly would else write its refusals as user turns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from csulora.errors import InputError
from csulora.io.files import check_file, write_text
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.probes import Chat, Message, from_text, is_refusal, prompt_hash

COUNT = 64  # prompts that are asked for
FEWEST = 16  # that must come of it
FIRST_WORDS = (
    "How", "What", "Can", "Write", "Explain", "Why", "Give", "Tell",
    "Describe", "List", "Which", "Is", "Where", "Who", "Suggest", "Compare",
)  # fmt: skip
REFUSALS = ("i'm sorry", "i am sorry", "sorry, ", "i can't", "i cannot", "i can not", "i'm unable", "as an ai")
_TEMPERATURE, _TOP_P = 0.8, 0.9
_EACH = 8  # turns that are drawn with one first word
_LONGEST = 48  # tokens of a turn
_LONGEST_REPLY = 32  # tokens that say whether a reply is a refusal
_FEWEST_WORDS = 3
_MARK = "csuloramarksthisplace"


def write_general(
    language_model: LanguageModel, seed: int = 0, refusals: Sequence[str] = (), seen: Collection[str] = ()
) -> tuple[Chat, ...]:
    """Let the model, as it now stands, write up to `COUNT` general prompts.

    A turn is taken if it ends by itself, is a line of a few words, is new and is no refusal. Nor may the model's reply
    to it be one, as far as ``refusals`` and `REFUSALS` tell.

    Args:
        language_model: the aligned model.
        seed: of the draws; the same seed gives the same prompts on the same machine.
        refusals: what else refusals hold.
        seen: hashes of prompts that are not wanted, see `csulora.tuning.probes.prompt_hash`.

    Raises:
        InputError: the model has no chat template, or fewer than `FEWEST` prompts are left.
    """
    known = (*REFUSALS, *refusals)
    written = list(dict.fromkeys(_turns(language_model, seed)))
    usable = [text for text in written if len(text.split()) >= _FEWEST_WORDS and not is_refusal(text, known)]
    chats = [chat for chat in map(from_text, usable) if prompt_hash(chat) not in seen][: COUNT + COUNT // 4]
    replies = language_model.replies(chats)
    texts = [language_model.tokenizer.decode(reply.tokens[reply.start :]) for reply in replies]
    answered = [chat for chat, text in zip(chats, texts, strict=True) if not is_refusal(text, known)][:COUNT]
    if len(answered) < FEWEST:
        raise InputError(
            f"the model wrote {len(answered)} general prompts that are no refusals and get none, of {len(written)} "
            f"different ones; at least {FEWEST} are needed, so give your own with --general"
        )
    return tuple(answered)


def written(
    file: Path,
    model: str,
    loading: Loading,
    seed: int,
    refusals: Sequence[str] | None = None,
    seen: Collection[str] = (),
) -> Path:
    """Return a file of prompts that the model wrote, which is made unless it is there.

    Args:
        file: what to write, or to leave as it is.
        model: the aligned model, a directory or a hub id.
        loading: where it runs.
        seed: of the draws.
        refusals: what else refusals hold.
        seen: as `write_general` takes it.

    Raises:
        InputError: as `write_general` does, or the file cannot be written.
    """
    if not file.exists():
        check_file(file)
        chats = write_general(LanguageModel.open(model, loading, _LONGEST_REPLY), seed, refusals or (), seen)
        write_text(file, "".join(f"{chat[0].content}\n" for chat in chats))
    return file


def _turns(language_model: LanguageModel, seed: int) -> Iterator[str]:
    """Draw users' turns, one of each first word after the other; those that do not end are left out."""
    before, after = _around_turn(language_model)
    tokenizer = language_model.tokenizer
    ends = [*(tokenizer.decode([end]) for end in language_model.ends), after, "\n"]
    words = FIRST_WORDS * _EACH
    starts = [tokenizer(f"{before}{word}", add_special_tokens=False)["input_ids"] for word in words]
    with torch.random.fork_rng([language_model.device] if language_model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = language_model.continued(starts, _LONGEST, temperature=_TEMPERATURE, top_p=_TOP_P, top_k=0)
    for word, start, tokens in zip(words, starts, drawn, strict=True):
        # Decoded with what stands before it, as many tokenizers drop the space at a beginning.
        text = _until(word + tokenizer.decode(tokens).removeprefix(tokenizer.decode(start)), ends)
        if text is not None:
            yield text


def _until(text: str, ends: Sequence[str]) -> str | None:
    """The text before the first of its ends; None if it has none."""
    places = [place for end in ends if end.strip(" ") and (place := text.find(end)) >= 0]
    return " ".join(text[: min(places)].split()) if places else None


def _around_turn(language_model: LanguageModel) -> tuple[str, str]:
    """What the model's template writes before a user's turn, and right after it."""
    tokenizer = language_model.tokenizer
    if tokenizer.chat_template is None:
        raise InputError("the model has no chat template, in which it could write prompts; give some with --general")
    turn = Message("user", _MARK)
    text = tokenizer.apply_chat_template([{"role": turn.role, "content": turn.content}], tokenize=False)
    before, found, after = text.partition(_MARK)
    if not found:
        raise InputError("the model's chat template changes what users say; give general prompts with --general")
    return before, after.strip("\n") or "\n"
