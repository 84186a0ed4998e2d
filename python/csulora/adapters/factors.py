"""The factors of one update as they lie in a file: which matrices are taken, and in which type they are used."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from csulora.adapters.lora import LoraModule, is_finite
from csulora.errors import InputError, NotFiniteError, NotPlainLoraError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that files may hold
_NUMBERS = (int, float, np.integer, np.floating)  # that torch multiplies tensors by


def check_matrix(
    name: str, tensor: torch.Tensor, path: Path, *, higher: str, empty: str, known_finite: bool = False
) -> None:
    """Raise unless a tensor is a finite matrix of a floating-point type.

    Args:
        name: the tensor's.
        tensor: to be checked.
        path: the file that holds it.
        higher: says what tensors of more dimensions are.
        empty: says what an empty tensor is.
        known_finite: whether somebody has looked that it holds neither NaN nor infinity.
    """
    if tensor.dim() in (3, 4, 5):
        raise NotPlainLoraError(f"{path}: {name} has {tensor.dim()} dimensions: {higher}")
    if tensor.numel() == 0:
        raise InputError(f"{path}: {name} is empty{empty}")
    if tensor.dim() != 2:
        raise InputError(f"{path}: {name} is {list(tensor.shape)}; a matrix is needed")
    if tensor.dtype not in DTYPES:
        raise InputError(f"{path}: {name} is {tensor.dtype}; float16, bfloat16, float32 or float64 is needed")
    if not (known_finite or is_finite(tensor)):
        raise NotFiniteError(f"{path}: {name} holds NaN or infinity")


def check_in_memory(name: str, module: LoraModule, path: Path) -> None:
    """Raise `InputError` unless an update that somebody made in memory holds numbers that csulora can read.

    What a file gave always does. Shapes and types are for others to check.

    Args:
        name: the module's.
        module: to be checked: ``b`` and ``a`` must be dense tensors with memory, ``scale`` a finite number.
        path: the adapter's.
    """
    for part, factor in (("b", module.b), ("a", module.a)):
        if not isinstance(factor, torch.Tensor):
            raise InputError(f"{path}: {name}: {part} is a {type(factor).__name__}; give a torch.Tensor")
        if factor.layout != torch.strided or factor.is_nested:
            raise InputError(f"{path}: {name}: {part} is no dense tensor; give {part}.to_dense()")
        if _is_without_memory(factor):
            raise InputError(f"{path}: {name}: {part} has no memory and holds no numbers; load its weights")
        if factor.dim() == 0:
            raise InputError(f"{path}: {name}: {part} is a single number; give a matrix")
    try:
        is_number = isinstance(module.scale, _NUMBERS) and math.isfinite(module.scale)
    except OverflowError:  # a whole number beyond float64
        is_number = False
    if not is_number:
        raise InputError(f"{path}: {name}: scale is {module.scale!r}; give a finite number")


def _is_without_memory(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor is a mere shape, or was given up to those who share a model's weights between machines."""
    if isinstance(tensor, torch.nn.UninitializedParameter):  # has no storage to ask for
        return True
    memory = tensor.untyped_storage()
    return memory.device.type == "meta" or (tensor.numel() > 0 and memory.nbytes() == 0)


def of_one_dtype(a: torch.Tensor, b: torch.Tensor, name: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both factors in the type that holds either; float64 becomes float32, in which hosts compute with it.

    Both are finite, see `check_matrix`.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if a.dtype == b.dtype == dtype:
        return a, b
    a, b = a.to(dtype), b.to(dtype)
    if not (is_finite(a) and is_finite(b)):
        raise NotFiniteError(f"{path}: {name} has factors that float32 cannot hold")
    return a, b


def wide(module: LoraModule) -> LoraModule:
    """Return the same update in float32, with its scale folded into ``b``."""
    return replace(module, b=module.b.float(), a=module.a.float()).folded()
