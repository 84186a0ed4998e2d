"""Matrices stored as codes of few bits with a scale per block: FP8 (E4M3), MXFP4, NVFP4. An entry is level times scale.

A code stands for a level. What is rounded to a level lies between the midpoints to its neighbours, and is taken to be
anywhere in between: that gives the variance of the rounding error. Scales differ between blocks, and so do variances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from csulora.models.rounding import RoundingVariances, add_up

Block = tuple[int, int]
"""Rows and columns of entries that share a scale."""

MXFP4_BLOCK: Block = (1, 32)
NVFP4_BLOCK: Block = (1, 16)
_CHUNK_ENTRIES = 1 << 22

# Errors of rows whose entries lie around another number than 0 are not quite centred. They come to at most 1.004 of
# the bound for independent errors in tests, and 0.8 to 0.92 elsewhere.
_MARGIN = 1.1


@dataclass(frozen=True)
class CodeFormat:
    """Levels of each code, float32 (NaN for a code without one), and the mean square error of what is rounded to it."""

    levels: torch.Tensor
    square_errors: torch.Tensor

    @classmethod
    def of(cls, levels: torch.Tensor, largest: float) -> CodeFormat:
        """Describe a format by its levels, which are symmetric; magnitudes up to ``largest`` go to the last of them."""
        magnitudes = levels.double().abs().nan_to_num_(0)
        distinct = torch.unique(magnitudes)
        middles = (distinct[1:] + distinct[:-1]) / 2
        above = torch.cat([middles, middles.new_tensor([largest])]) - distinct
        below = distinct - torch.cat([middles.new_zeros(1), middles])
        square_errors = (above**3 + below**3) / (3 * (above + below))
        return cls(levels, square_errors[torch.searchsorted(distinct, magnitudes)])


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

# Scales bring the largest entry of a block to the last level, 448, beyond which nothing lies but its own rounding.
FP8 = CodeFormat.of(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(), 464)
# Scales are powers of two that bring the largest entry of a block to below 8, which is then cut off at 6.
MXFP4 = CodeFormat.of(torch.cat([_E2M1, -_E2M1]), 8)
# Scales, E4M3 numbers, bring the largest entry to 6, but for their own rounding.
NVFP4 = CodeFormat.of(torch.cat([_E2M1, -_E2M1]), 7)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of MXFP4 blocks, (..., G, 16) uint8 with the first in the lower half -> (..., 32 G) uint8."""
    return torch.stack([packed & 0x0F, packed >> 4], -1).flatten(-3)


def decode_exponents(scales: torch.Tensor) -> torch.Tensor:
    """Return 2^(byte - 127) of uint8 scales, float32; 255 is NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def dequantise(codes: torch.Tensor, scales: torch.Tensor, block: Block, code_format: CodeFormat) -> torch.Tensor:
    """Return the values of a matrix.

    Args:
        codes: (m, n) uint8.
        scales: (R, C) float32, one for each ``block``; the blocks at the lower and right edges may be smaller.
        block: rows and columns of a block.
        code_format: what the codes stand for.

    Returns:
        (m, n) float32.
    """
    matrix = torch.empty(codes.shape)
    for rows, spread in _chunks(codes, scales, block):
        torch.mul(_look_up(code_format.levels, codes[rows]), spread, out=matrix[rows])
    return matrix


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values of MXFP4 matrices: (..., m, G, 16) and (..., m, G), both uint8 -> (..., m, 32 G) float32."""
    codes = unpack_nibbles(blocks)
    matrix = dequantise(
        codes.reshape(-1, codes.shape[-1]),
        decode_exponents(scales).reshape(-1, scales.shape[-1]),
        MXFP4_BLOCK,
        MXFP4,
    )
    return matrix.reshape(codes.shape)


def rounding_variances(
    codes: torch.Tensor, scales: torch.Tensor, block: Block, code_format: CodeFormat
) -> RoundingVariances:
    """Return the variances of a matrix's rounding errors; arguments as `dequantise` takes them."""
    return add_up(
        (
            (_look_up(code_format.square_errors, codes[rows]) * spread.double().square_()).numpy()
            for rows, spread in _chunks(codes, scales, block)
        ),
        codes.shape[1],
        _MARGIN,
    )


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    # Half the time of table[codes].
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _chunks(codes: torch.Tensor, scales: torch.Tensor, block: Block) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield some rows at a time, and the scale of each of their entries."""
    rows, columns = codes.shape
    step = max(1, _CHUNK_ENTRIES // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        of_rows = scales[torch.arange(start, stop) // block[0]]
        yield slice(start, stop), of_rows.repeat_interleave(block[1], 1)[:, :columns]
