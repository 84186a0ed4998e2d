"""The factors of one update as they lie in a GGUF LoRA file."""

from __future__ import annotations

import math

import torch
from gguf import GGMLQuantizationType

from csulora.adapters.factors import of_one_dtype
from csulora.adapters.lora import is_finite
from csulora.errors import InputError, NotFiniteError, RefusedError
from csulora.models import gguf_experts, gguf_quants
from csulora.models.gguf_file import GGUFFile

_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def pair(file: GGUFFile, what: str, factors: dict[str, str], dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of one update in one type.

    Args:
        file: that holds them.
        what: what messages call the update.
        factors: the tensors, by ``lora_a`` and ``lora_b``.
        dimensions: 2 of a matrix, 3 of the matrices of all experts.

    Raises:
        InputError: a factor is missing, or not finite, or no such matrix.
        RefusedError: it is of another type.
    """
    for factor in ("lora_a", "lora_b"):
        if factor not in factors:
            raise InputError(f"{file.path}: {what} has no {factor}; an update needs both factors")
    a, b = (_factor(file, factors[factor], dimensions) for factor in ("lora_a", "lora_b"))
    return of_one_dtype(a, b, what, file.path)


def _factor(file: GGUFFile, tensor: str, dimensions: int) -> torch.Tensor:
    info = file.tensors[tensor]
    dtype = _TYPES.get(info.type)
    if dtype is None and info.type != GGMLQuantizationType.Q8_0:
        raise RefusedError(f"{file.path}: tensor {tensor} is {info.type.name}; F32, F16, BF16 or Q8_0 is needed")
    # ggml leaves out leading dimensions of 1: a factor of rank 1 may have one dimension.
    shape = (1, *info.shape) if len(info.shape) == 1 else info.shape
    if len(shape) != dimensions:
        needed = "a matrix" if dimensions == 2 else "a matrix for each expert"
        raise InputError(f"{file.path}: tensor {tensor} is {list(shape)}; {needed} is needed")
    if dimensions == 3 and shape[0] > gguf_experts.MOST_EXPERTS:
        raise InputError(
            f"{file.path}: tensor {tensor} has {shape[0]} experts; at most {gguf_experts.MOST_EXPERTS} are possible"
        )
    data = file.bytes_of(tensor)
    if dtype is None:
        matrix = gguf_quants.dequantise(data, (math.prod(shape[:-1]), shape[-1]), info.type).reshape(shape)
    else:
        matrix = torch.frombuffer(data, dtype=dtype).reshape(shape)
    if not is_finite(matrix):
        raise NotFiniteError(f"{file.path}: tensor {tensor} holds NaN or infinity{_first_expert(matrix)}")
    return matrix


def _first_expert(factor: torch.Tensor) -> str:
    if factor.dim() == 2:
        return ""
    return f" for expert {next(i for i, matrix in enumerate(factor) if not is_finite(matrix))}"
