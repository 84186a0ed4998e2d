"""The bytes of ``adapter_model.safetensors``: read once, after the header was checked, and never mapped."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from csulora.adapters.peft.tensor_names import module_and_factor
from csulora.errors import InputError, RefusedError
from csulora.io.files import open_regular, parse_json

LARGEST_WEIGHTS = 16 << 30
_LONGEST_HEADER = 64 << 20  # bytes; that of the largest adapter that is read has 23 MiB
_MOST_TENSORS = 1 << 18  # two factors for each of 256 experts, three projections and 60 layers are 92,160


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; no memory is taken for the data of a file with a bad header."""
    try:
        with open_regular(path, LARGEST_WEIGHTS) as file:
            size = os.fstat(file.fileno()).st_size
            _check_header(file, size, path)
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error


def _check_header(file: BufferedReader, size: int, path: Path) -> None:
    """Check what a safetensors header says of the file before its data are read.

    It is read and not mapped: a process dies of a mapped file that somebody makes shorter.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise InputError(f"{path}: not a readable safetensors file: its header of {length} bytes is too long")
    header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise RefusedError(f"{path}: holds {len(header)} tensors; at most {_MOST_TENSORS} are read")
    for name in header:
        module_and_factor(name, path)
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a readable safetensors file: a tensor has no data_offsets") from error
    if end != size - 8 - length:
        raise InputError(
            f"{path}: not a readable safetensors file: its header speaks of {end} bytes of data, and it has "
            f"{size - 8 - length}; is it complete?"
        )


def tensors_in(weights: bytes, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file's bytes, by name."""
    try:
        return safetensors.torch.load(weights)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype torch lacks
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
