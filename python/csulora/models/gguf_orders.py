"""The orders in which llama.cpp keeps rows and columns of weights that Hugging Face orders otherwise.

An order of n entries is an index, (n,) int64: entry i of a GGUF file is Hugging Face's entry ``order[i]``. It follows
from how many heads the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

Counts = Mapping[str, int]
Order = Callable[[Counts, int], torch.Tensor]


class Spread(NamedTuple):
    """Tensors over which the rows of one matrix are spread, one after the other."""

    tensors: tuple[str, ...]  # ends of their GGUF names less ``.weight``
    heights: Callable[[Counts, int], tuple[int, ...]]  # how many of so many rows each holds


@dataclass(frozen=True)
class Source:
    """Where a count stands: in GGUF metadata, after the architecture's name, and in config.json."""

    metadata: str
    config: str
    default: str | None = None  # the count that it is equal to if it is not stated


SOURCES = {
    "heads": Source("attention.head_count", "num_attention_heads"),
    "kv_heads": Source("attention.head_count_kv", "num_key_value_heads", default="heads"),
    "key_heads": Source("ssm.group_count", "linear_num_key_heads"),
    "key_size": Source("ssm.state_size", "linear_key_head_dim"),
    "value_heads": Source("ssm.time_step_rank", "linear_num_value_heads"),
    "value_size": Source("ssm.state_size", "linear_value_head_dim"),
}


def rotary_queries(counts: Counts, size: int) -> torch.Tensor:
    """Pair the rows of query heads as llama.cpp rotates them."""
    return _rotary(counts["heads"], size)


def rotary_keys(counts: Counts, size: int) -> torch.Tensor:
    """Pair the rows of key heads as llama.cpp rotates them."""
    return _rotary(counts["kv_heads"], size)


def value_heads(counts: Counts, size: int) -> torch.Tensor:
    """Order value heads by their place in their group.

    Hugging Face keeps the value heads of one key head together, llama.cpp the first value heads of all key heads.
    """
    groups, heads = counts["key_heads"], counts["value_heads"]
    if heads % groups or size % heads:
        raise ValueError(f"{size} entries, which are not {heads} value heads of {groups} groups")
    return torch.arange(size).reshape(groups, heads // groups, -1).transpose(0, 1).flatten()


def values_last(counts: Counts, size: int) -> torch.Tensor:
    """Leave queries and keys as they are, and order the value heads behind them."""
    values = counts["value_heads"] * counts["value_size"]
    if size <= values:
        raise ValueError(f"{size} entries, which leave none beside {values} of values")
    return torch.cat([torch.arange(size - values), size - values + value_heads(counts, values)])


def gates_last(counts: Counts, size: int) -> torch.Tensor:
    """Put all queries first, then all keys, all values and all gates.

    Hugging Face keeps those of one key head together: its query, its key, its values, and as many gates.
    """
    heads, values = counts["key_heads"], _values_of_a_key_head(counts, size)
    sizes = [counts["key_size"], counts["key_size"], values, values]
    blocks = torch.arange(size).reshape(heads, -1).split_with_sizes(sizes, dim=1)
    return torch.cat([block.flatten() for block in blocks])


def heights_with_gates(counts: Counts, size: int) -> tuple[int, int]:
    """Return how many rows are queries, keys and values, and how many are gates."""
    gates = counts["key_heads"] * _values_of_a_key_head(counts, size)
    return size - gates, gates


def _values_of_a_key_head(counts: Counts, size: int) -> int:
    group, rest = divmod(size, counts["key_heads"])
    values, odd = divmod(group - 2 * counts["key_size"], 2)
    if rest or odd or values < 1:
        raise ValueError(
            f"{size} entries, which are not queries, keys, values and gates of {counts['key_heads']} key heads"
        )
    return values


def _rotary(heads: int, size: int) -> torch.Tensor:
    """Hugging Face rotates row i of a head of d rows together with row i + d/2, llama.cpp row 2i with row 2i + 1."""
    if size % (2 * heads):
        raise ValueError(f"{size} entries, which are not {heads} heads of even size")
    return torch.arange(size).reshape(heads, 2, -1).transpose(1, 2).flatten()
