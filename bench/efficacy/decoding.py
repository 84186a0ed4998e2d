"""Greedy replies to chats, several at a time: the one way in which the benchmarks decode with transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@torch.inference_mode()
def decode(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Messages],
    most: int,
    **options: Any,
) -> list[str]:
    """Return the replies in order, each of at most ``most`` tokens; ``options`` are further ones of ``generate``."""
    inputs = cast(
        BatchEncoding,
        tokenizer.apply_chat_template(
            list(chats), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ),
    )
    generate = cast("Callable[..., Tensor]", model.generate)
    output = generate(**inputs, max_new_tokens=most, do_sample=False, **options)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
