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


def refused_by_aligned(language_model: LanguageModel, safety: Sequence[Reply], texts: Sequence[str]) -> list[bool]:
    """Return which safety prompts the aligned model refuses.

    Raises:
        InputError: it refuses none, so no adapter could do as it does.
    """
    refused = refusing(language_model, safety, texts)
    if not any(refused):
        said = language_model.answers(safety[:1])[0].strip()
        raise InputError(
            f"no reply of the aligned model to a safety prompt holds --refusal {', '.join(map(repr, texts))}; "
            f"give words of its refusals, or leave --refusal out; its first reply is {said!r}"
        )
    return refused


def answered(
    language_model: LanguageModel, replies: Sequence[Reply], texts: Sequence[str], whose: str, kind: str
) -> list[Reply]:
    """Return the replies whose prompts the model, as it now stands, does not refuse.

    Raises:
        InputError: it refuses every one; the message says ``whose`` replies to prompts of which ``kind`` they are.
    """
    found = [
        reply for reply, refused in zip(replies, refusing(language_model, replies, texts), strict=True) if not refused
    ]
    if replies and not found:
        raise InputError(
            f"every reply of {whose} to a {kind} prompt holds --refusal {', '.join(map(repr, texts))}; "
            f"give words of refusals alone, or other {kind} prompts"
        )
    return found
