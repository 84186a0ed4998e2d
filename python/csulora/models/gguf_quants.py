"""Quantised GGUF tensors: their values, by gguf's dequantisers, and how far rounding may have moved them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from csulora.models import gguf_codes, scaled_codes
from csulora.models.rounding import RoundingVariances, add_up

_CHUNK_BYTES = 1 << 20

# Weights that had been quantised before lie on a grid, and rounding them to another repeats the same errors in many
# entries: SmolLM2's, shipped as Q4_1, exceed the bound for independent errors by up to 1.9. Others stay below it. It
# does not cover files that were made from each other on grids of which one contains the other (Q5_0 and Q4_0).
_MARGIN = 2.0


@dataclass(frozen=True)
class _Levels:
    """Where a block keeps the numbers of its levels, and how many steps lie between the lowest and the highest.

    All bits 0 is the lowest level and all bits 1 the highest (of Q8_0: neighbours, since its levels have signs).
    """

    bits: slice
    steps: int


# The types whose levels are equally spaced. Others (IQ*, TQ*) round to code books, which no spacing describes.
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

QUANTISED = tuple(kind.name for kind in (*_LEVELS, *gguf_codes.FORMATS))


def dequantise(data: memoryview, shape: tuple[int, int], kind: GGMLQuantizationType) -> torch.Tensor:
    """Return the values of a quantised matrix, (rows, columns) float32."""
    with np.errstate(all="ignore"):  # not finite values are reported by whoever uses them
        return torch.from_numpy(quants.dequantize(_rows(data, shape), kind))


def rounding_variances(data: memoryview, shape: tuple[int, int], kind: GGMLQuantizationType) -> RoundingVariances:
    """Return the variances of a quantised matrix's rounding errors: h^2 / 12 for levels that are h apart.

    Spacings differ between blocks, and so do the variances of a row's entries. Of types with codes see `scaled_codes`.
    """
    if kind in gguf_codes.FORMATS:
        return scaled_codes.rounding_variances(*gguf_codes.unpack(_rows(data, shape), kind), *gguf_codes.FORMATS[kind])
    levels = _LEVELS[kind]

    def variances(rows: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            low, high = (quants.dequantize(_with_bits(rows, kind, levels.bits, bits), kind) for bits in (0x00, 0xFF))
            return np.asarray(np.square((high - low) / levels.steps, dtype=np.float64) / 12)

    return add_up(map(variances, _chunks(_rows(data, shape))), shape[1], _MARGIN)


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
