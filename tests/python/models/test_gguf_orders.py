"""llama.cpp's orders, against their definition by hand."""

import pytest
import torch

from csulora.models import gguf_orders
from csulora.models.gguf_orders import Order

COUNTS = {"heads": 2, "kv_heads": 1, "key_heads": 2, "value_heads": 6, "value_size": 2, "key_size": 1}


@pytest.mark.parametrize(
    ("order", "size", "expected"),
    [
        # Two heads of six rows: 0 is rotated together with 3.
        (gguf_orders.rotary_queries, 12, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        (gguf_orders.rotary_keys, 6, [0, 3, 1, 4, 2, 5]),
        # Three value heads for each of two key heads: the first ones come first.
        (gguf_orders.value_heads, 6, [0, 3, 1, 4, 2, 5]),
        (gguf_orders.value_heads, 12, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
        (gguf_orders.values_last, 14, [0, 1, 2, 3, 8, 9, 4, 5, 10, 11, 6, 7, 12, 13]),
        # Of each of two key heads: a query, a key, two values and two gates.
        (gguf_orders.gates_last, 12, [0, 6, 1, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
    ],
)
def test_orders(order: Order, size: int, expected: list[int]) -> None:
    assert order(COUNTS, size).tolist() == expected


def test_gates_are_spread_to_a_tensor_of_their_own() -> None:
    assert gguf_orders.heights_with_gates(COUNTS, 12) == (8, 4)


@pytest.mark.parametrize(
    "order", [gguf_orders.rotary_queries, gguf_orders.value_heads, gguf_orders.values_last, gguf_orders.gates_last]
)
@pytest.mark.parametrize("size", [3, 7])
def test_a_size_that_heads_do_not_divide_is_an_error(order: Order, size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} entries, which"):
        order(COUNTS, size)


def test_one_value_head_for_each_key_head_is_no_change() -> None:
    counts = COUNTS | {"key_heads": 6}
    assert torch.equal(gguf_orders.value_heads(counts, 12), torch.arange(12))
