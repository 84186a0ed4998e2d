"""Tensors as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, TensorSpec, serialize_file

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, not atomically; raises OSError, which is not what safetensors raises."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        serialize_file({name: _specification(tensor) for name, tensor in kept.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _specification(tensor: Tensor) -> TensorSpec:
    """Describe a tensor as safetensors' own function for torch does, which takes ten times as long for small ones."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
