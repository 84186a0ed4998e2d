"""Checkpoints whose matrices are stored as FP8 or MXFP4, quantised as those who publish them do, and float64 twins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import factories

Block = tuple[int, int]
Parts = dict[str, Tensor]  # suffix of `.weight` -> tensor
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def spread(scales: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Every entry's scale, float64."""
    ones = torch.ones(block, dtype=torch.float64)
    return torch.kron(scales.double(), ones)[: shape[0], : shape[1]]


def fp8(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Codes and scales that bring the largest entry of each block to 448."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight
    largest = padded.view(grid[0], block[0], grid[1], block[1]).abs().amax((1, 3))
    scales = largest.clamp_min(1e-12) / 448
    scaled = weight / spread(scales, block, (rows, columns)).float()
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def fp8_values(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Sign, exponent and fraction of each code by its bits, times its scale, float64."""
    bits = codes.view(torch.uint8).int()
    sign, exponent, fraction = 1 - 2 * (bits >> 7), bits >> 3 & 15, (bits & 7).double()
    normal = (1 + fraction / 8) * torch.exp2(exponent.double() - 7)
    levels = torch.where(exponent > 0, normal, fraction / 8 * 2.0**-6)
    return sign * levels * spread(scales, block, (codes.shape[0], codes.shape[1]))


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (m, G, 16) and scales (m, G), powers of two by which the largest entry of each 32 comes to [4, 8)."""
    groups = weight.double().reshape(*weight.shape[:-1], -1, 32)
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    exponents = largest.log2().floor() - 2
    scaled = groups / exponents.exp2()
    codes = torch.bucketize(scaled.abs(), (E2M1[1:] + E2M1[:-1]) / 2) + 8 * (scaled < 0)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8)


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """The lower half of each byte comes first; float64."""
    codes = torch.stack([blocks % 16, blocks // 16], -1).flatten(-2).long()
    levels = torch.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])
    return (levels * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Kind:
    """How one kind of checkpoint stores a matrix, and what its config.json says."""

    quantise: Callable[[Tensor], tuple[Parts, Tensor]]
    settings: dict[str, Any]


def _fp8_kind(
    name: str, block_of: Callable[[Tensor], Block], dtype: torch.dtype, shape: Callable[[Tensor], Any]
) -> Any:
    def quantise(weight: Tensor) -> tuple[Parts, Tensor]:
        block = block_of(weight)
        scales = fp8(weight, block)[1].to(dtype)
        scaled = weight / spread(scales, block, (weight.shape[0], weight.shape[1])).float()
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": codes, name: scales.reshape(shape(scales))}, fp8_values(codes, scales, block)

    return quantise


def _mxfp4_kind(weight: Tensor) -> tuple[Parts, Tensor]:
    blocks, scales = mxfp4(weight)
    return {"_blocks": blocks, "_scales": scales}, mxfp4_values(blocks, scales)


_CHANNELS = {"type": "float", "num_bits": 8, "strategy": "channel", "group_size": None, "block_structure": None}
_FLOAT_QUANTISED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
KINDS = {
    "blocks": Kind(
        _fp8_kind("_scale_inv", lambda _: (32, 32), torch.float32, lambda scales: scales.shape),
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ),
    "one scale": Kind(
        _fp8_kind("_scale_inv", lambda weight: (len(weight), weight.shape[1]), torch.bfloat16, lambda _: ()),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "channels": Kind(
        _fp8_kind("_scale", lambda weight: (1, weight.shape[1]), torch.bfloat16, lambda scales: scales.shape),
        _FLOAT_QUANTISED | {"config_groups": {"group_0": {"weights": _CHANNELS}}},
    ),
    "blocks of compressed-tensors": Kind(
        _fp8_kind("_scale", lambda _: (16, 16), torch.float32, lambda scales: scales.shape),
        _FLOAT_QUANTISED
        | {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [16, 16]}}}},
    ),
    "MXFP4": Kind(_mxfp4_kind, {"quant_method": "mxfp4"}),
}


def quantise(weights: Mapping[str, Tensor], kind: Kind) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Store every matrix of a layer as `kind` says; returns the tensors of the file and the values, float64."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and ".layers." in name:
            parts, values[name] = kind.quantise(weight.float())
            tensors |= {f"{name}{suffix}": part for suffix, part in parts.items()}
            tensors[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
        else:
            tensors[name], values[name] = weight, weight.double()
    return tensors, values


def save(directory: Path, weights: Mapping[str, Tensor], kind: Kind, **config: object) -> Path:
    """Write a model directory with quantised matrices."""
    tensors, _ = quantise(weights, kind)
    return factories.save_checkpoint(directory, tensors, {"quantization_config": kind.settings, **config})
