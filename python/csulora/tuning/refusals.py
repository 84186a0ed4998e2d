"""Refusals among a model's replies: those that hold one of the texts that the user names."""

from __future__ import annotations

from collections.abc import Sequence

from csulora.errors import InputError
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import is_refusal
from csulora.tuning.replies import Reply


def refusing(language_model: LanguageModel, replies: Sequence[Reply], texts: Sequence[str]) -> list[bool]:
    """Return whether the model, as it now stands, refuses the prompt of each reply."""
    return [is_refusal(answer, texts) for answer in language_model.answers(replies)]


def _are_refusals(language_model: LanguageModel, replies: Sequence[Reply], texts: Sequence[str]) -> list[bool]:
    return [is_refusal(text, texts) for text in language_model.texts(replies)]


def refused_by_aligned(language_model: LanguageModel, safety: Sequence[Reply], texts: Sequence[str]) -> list[bool]:
    """Return which safety prompts the aligned model refuses, by its replies.

    Raises:
        InputError: it refuses none, so no adapter could do as it does.
    """
    refused = _are_refusals(language_model, safety, texts)
    if not any(refused):
        said = language_model.texts(safety[:1])[0].strip()
        raise InputError(
            f"no reply of the aligned model to a safety prompt holds --refusal {', '.join(map(repr, texts))}; "
            f"give words of its refusals, or leave --refusal out; its first reply is {said!r}"
        )
    return refused


def answered(
    language_model: LanguageModel, replies: Sequence[Reply], texts: Sequence[str], whose: str, kind: str
) -> list[Reply]:
    """Return the replies that are no refusals.

    Raises:
        InputError: every one is; the message says ``whose`` replies to prompts of which ``kind`` they are.
    """
    refused = _are_refusals(language_model, replies, texts)
    found = [reply for reply, is_refused in zip(replies, refused, strict=True) if not is_refused]
    if replies and not found:
        raise InputError(
            f"every reply of {whose} to a {kind} prompt holds --refusal {', '.join(map(repr, texts))}; "
            f"give words of refusals alone, or other {kind} prompts"
        )
    return found
