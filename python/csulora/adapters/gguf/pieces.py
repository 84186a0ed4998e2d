"""Updates of a matrix whose rows a GGUF file spreads over several tensors: each tensor has a pair of factors.

Pairs with equal A are one update of the same rank. Others make one whose rank is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from csulora.adapters.lora import LoraModule, stacked
from csulora.errors import InputError
from csulora.models.gguf_base import BaseModel


def together(module: str, pieces: Mapping[str, LoraModule], base: BaseModel, path: Path) -> LoraModule:
    """Return the update of a whole matrix, its rows in the order in which the tensors follow each other.

    Rows of tensors without an update get zeros.

    Args:
        module: the matrix.
        pieces: its updates, by the GGUF name, less ``.weight``, of the tensor.
        base: the model.
        path: of the file that holds the updates.

    Raises:
        InputError: the model has no such tensor, or one of another shape.
    """
    heights = base.heights(module) if module in base.shapes else {}
    for tensor, update in pieces.items():
        if tensor not in heights:
            raise InputError(f"{path}: {tensor} does not exist in {base.path}; the adapter is for another model")
        if update.shape != (expected := (heights[tensor], base.shapes[module][1])):
            raise InputError(
                f"{path}: {tensor} updates a {list(update.shape)} matrix, but it is {list(expected)} in {base.path}"
            )
    starts = dict(zip(heights, accumulate(heights.values(), initial=0), strict=False))
    placed = [(slice(starts[tensor], starts[tensor] + heights[tensor]), update) for tensor, update in pieces.items()]
    return stacked(placed, sum(heights.values()))
