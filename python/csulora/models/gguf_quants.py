"""Quantised GGUF tensors: their values, by gguf's dequantisers, and how far rounding may have moved them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Levels:
    """Where a block keeps the numbers of its levels, and how many steps lie between the lowest and the highest.

    All bits 0 is the lowest level and all bits 1 the highest (of Q8_0: neighbours, since its levels have signs).
    """

    bits: slice
    steps: int


# The types whose levels are equally spaced. Others (IQ*, TQ*, MXFP4) round to code books, which no spacing describes.
_LEVELS = {
    GGMLQuantizationType.Q4_0: _Levels(slice(2, 18), 15),
    GGMLQuantizationType.Q4_1: _Levels(slice(4, 20), 15),
    GGMLQuantizationType.Q5_0: _Levels(slice(2, 22), 31),
    GGMLQuantizationType.Q5_1: _Levels(slice(4, 24), 31),
    GGMLQuantizationType.Q8_0: _Levels(slice(2, 34), 1),
    GGMLQuantizationType.Q2_K: _Levels(slice(16, 80), 3),
    GGMLQuantizationType.Q3_K: _Levels(slice(0, 96), 7),
    GGMLQuantizationType.Q4_K: _Levels(slice(16, 144), 15),
    GGMLQuantizationType.Q5_K: _Levels(slice(16, 176), 31),
    GGMLQuantizationType.Q6_K: _Levels(slice(0, 192), 63),
}

QUANTISED = tuple(kind.name for kind in _LEVELS)


def dequantise(data: memoryview, shape: tuple[int, int], kind: GGMLQuantizationType) -> torch.Tensor:
    """Return the values of a quantised matrix, (rows, columns) float32."""
    with np.errstate(all="ignore"):  # not finite values are reported by whoever uses them
        return torch.from_numpy(quants.dequantize(_rows(data, shape), kind))


class RoundingVariances(NamedTuple):
    """Variances of a matrix's rounding errors, added up along each row and each column: the largest sums."""

    row: float
    column: float


def rounding_variances(data: memoryview, shape: tuple[int, int], kind: GGMLQuantizationType) -> RoundingVariances:
    """Return the variances of a quantised matrix's rounding errors: h^2 / 12 for levels that are h apart.

    Spacings differ between blocks, and so do the variances of a row's entries.
    """
    levels = _LEVELS[kind]
    largest_row, columns = 0.0, np.zeros(shape[1])
    for rows in _chunks(_rows(data, shape)):
        with np.errstate(all="ignore"):
            low, high = (quants.dequantize(_with_bits(rows, kind, levels.bits, bits), kind) for bits in (0x00, 0xFF))
            variances = np.square((high - low) / levels.steps, dtype=np.float64) / 12
        largest_row = max(largest_row, float(variances.sum(1).max()))
        columns += variances.sum(0)
    return RoundingVariances(largest_row, float(columns.max()))


def _rows(data: memoryview, shape: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(shape[0], -1)


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _with_bits(rows: np.ndarray, kind: GGMLQuantizationType, bits: slice, value: int) -> np.ndarray:
    """Return the rows with all bits of the levels' numbers set to one value."""
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = rows.reshape(-1, block_bytes).copy()
    blocks[:, bits] = value
    return blocks.reshape(rows.shape)
