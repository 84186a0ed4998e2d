"""The safetensors files of an adapter: read once, after the headers were checked, never mapped; and their hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csulora.adapters.factors import DTYPES
from csulora.adapters.lora import Adapter, is_finite
from csulora.errors import InputError, TooLargeError
from csulora.io.files import open_regular, parse_json

CONFIG_FILE = "adapter_config.json"  # PEFT's and mlx-lm's alike
LARGEST_CONFIG = 16 << 20  # bytes; a config with a rank and an alpha for each of 10,000 modules has 2 MiB
LARGEST_WEIGHTS = 16 << 30  # bytes, of all files of an adapter together
_LONGEST_HEADER = 64 << 20  # bytes, of all files together; that of the largest adapter that is read has 23 MiB
_MOST_TENSORS = 1 << 18  # two factors for each of 256 experts, three projections and 60 layers are 92,160
MOST_UPDATES = _MOST_TENSORS // 2  # that an adapter may have; fused factors hold many of them in two tensors
_MOST_DIMENSIONS = 8  # of a tensor; a factor has two, and the product of very many would take long
_LENGTH_BYTES = 8  # that say how long the header is
_PART = 4 << 20  # bytes that are read and hashed at a time; of less it does not pay to start a thread
_NOT_READABLE = "not a readable safetensors file"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

CheckName = Callable[[str, Path], object]
"""Raises unless a tensor of that name may stand in that file."""


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file in memory.

    Attributes:
        path: where it was read.
        sha256: of all its bytes.
        tensors: by name; they share the memory that the file was read into.
        is_finite: whether it is known that none of them holds NaN or infinity; it is not of several types together.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, torch.Tensor]
    is_finite: bool


def read_weights(paths: Sequence[Path], check_name: CheckName) -> list[WeightsFile]:
    """Read an adapter's files; no memory is taken for the data of a file with a bad header.

    Raises:
        InputError: a file is malformed, or its size is beyond what is read.
    """
    found: list[WeightsFile] = []
    left = _Left(LARGEST_WEIGHTS, _LONGEST_HEADER, _MOST_TENSORS)
    for path in paths:
        try:
            with open_regular(path, left.bytes) as file:
                found.append(_read(file, path, check_name, left))
        except OSError as error:
            raise InputError(f"{path}: {_NOT_READABLE}: {error}") from error
    return found


@dataclass
class _Left:
    """What an adapter's further files may hold, in bytes, in bytes of their headers, and in tensors."""

    bytes: int
    header: int
    tensors: int


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: NDArray[np.uint8]) -> torch.Tensor:
        """Return the tensor in the bytes that follow the header."""
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.begin % self.dtype.itemsize:
            return torch.from_numpy(data[self.begin : self.end].copy()).view(self.dtype).view(self.shape)
        count = (self.end - self.begin) // self.dtype.itemsize
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin).view(self.shape)


def _read(file: BufferedReader, path: Path, check_name: CheckName, left: _Left) -> WeightsFile:
    """Read and hash a file of which no more than its header was seen before memory is taken for the rest.

    It is read and not mapped: a process dies of a mapped file that somebody makes shorter.
    """
    size = os.fstat(file.fileno()).st_size
    length = file.read(_LENGTH_BYTES)
    header_size = int.from_bytes(length, "little")
    if header_size > min(size - _LENGTH_BYTES, left.header):
        raise InputError(f"{path}: {_NOT_READABLE}: its header of {header_size} bytes is too long")
    header = file.read(header_size)
    entries = _entries(header, size - _LENGTH_BYTES - header_size, path, check_name, left.tensors)
    left.bytes -= size
    left.header -= header_size
    left.tensors -= len(entries)
    digest = hashlib.sha256(length + header)
    data = np.empty(size - _LENGTH_BYTES - header_size, np.uint8)
    known = _fill(data, file, digest, path, {entry.dtype for entry in entries.values()})
    return WeightsFile(path, digest.hexdigest(), {name: entry.view(data) for name, entry in entries.items()}, known)


def _fill(
    data: NDArray[np.uint8], file: BufferedReader, digest: hashlib._Hash, path: Path, dtypes: Collection[torch.dtype]
) -> bool:
    """Read the rest of a file; each part is hashed while the next one is read, and the last while all are looked at.

    Returns:
        Whether all of it is of one type, and no number in it is NaN or infinite.
    """
    parts = [data[start : start + _PART] for start in range(0, len(data), _PART)]
    dtype = next(iter(dtypes), torch.uint8)
    known = len(dtypes) == 1 and dtype in DTYPES
    with nullcontext() if len(parts) < 2 else ThreadPoolExecutor(max_workers=1) as pool:
        for part in parts:
            if file.readinto(part.data) != len(part):
                raise InputError(f"{path}: {_NOT_READABLE}: it became shorter; is somebody writing it?")
            if pool:
                pool.submit(digest.update, part.data)
            else:
                digest.update(part.data)
        return known and len(data) > 0 and is_finite(torch.frombuffer(data, dtype=dtype))


def _entries(header: bytes, size: int, path: Path, check_name: CheckName, most: int) -> dict[str, _Entry]:
    """Return what a header says, if it speaks of each of the ``size`` bytes that follow it once."""
    document = parse_json(header, path)
    _check_metadata(document.pop("__metadata__", None), path)
    if len(document) > most:
        raise TooLargeError(f"{path}: holds {len(document)} tensors; at most {_MOST_TENSORS} are read")
    for name in document:
        check_name(name, path)
    found = {name: _entry(name, entry, path) for name, entry in document.items()}
    end = 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise InputError(f"{path}: {_NOT_READABLE}: {name} begins at byte {entry.begin}, and not at {end}")
        end = entry.end
    if end != size:
        raise InputError(
            f"{path}: {_NOT_READABLE}: its header speaks of {end} bytes of data, and it has {size}; is it complete?"
        )
    return found


def _check_metadata(metadata: Any, path: Path) -> None:
    is_of_text = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    if metadata is not None and not is_of_text:
        raise InputError(f"{path}: {_NOT_READABLE}: its __metadata__ holds something else than texts")


def _entry(name: str, entry: Any, path: Path) -> _Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        is_sized = len(shape) <= _MOST_DIMENSIONS and all(
            type(number) is int and 0 <= number <= LARGEST_WEIGHTS for number in numbers
        )
        # A tensor with a zero in its shape is empty, whatever the others are: torch multiplies them all the same.
        is_sized = is_sized and math.prod(filter(None, shape)) <= LARGEST_WEIGHTS
        known = _DTYPES.get(dtype)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {_NOT_READABLE}: its header does not say what {name} is") from error
    if known is None:
        raise InputError(f"{path}: {_NOT_READABLE}: {name} has the type {dtype!r}, which torch lacks")
    if not is_sized or math.prod(shape) * known.itemsize != end - begin:
        raise InputError(f"{path}: {_NOT_READABLE}: {name} does not fit between the bytes {begin} and {end}")
    return _Entry(known, tuple(shape), begin, end)


def tensors_in(files: Sequence[WeightsFile]) -> dict[str, torch.Tensor]:
    """Return the tensors of all files by name; raises `InputError` if one stands in two files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if twice := file.tensors.keys() & tensors.keys():
            raise InputError(f"{file.path}: holds {min(twice)}, and so does another file of the adapter")
        tensors |= file.tensors
    return tensors


def with_hashes(adapter: Adapter, config: bytes, weights: Sequence[WeightsFile]) -> Adapter:
    """Return an adapter with the hashes of the files that it was read from: its configuration, and its weights."""
    files = {CONFIG_FILE: hashlib.sha256(config).hexdigest()} | {file.path.name: file.sha256 for file in weights}
    return replace(adapter, sha256=joined(*files.values()), files=files)


def sha256_of(config: bytes, *weights: bytes) -> str:
    """Hash an adapter: the sha256 over the hex sha256 of the config's and of each weights file's bytes, a line each."""
    return joined(*(hashlib.sha256(data).hexdigest() for data in (config, *weights)))


def hashes_as_written(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return name -> sha256 of the files of a directory that was just written; of the weights a header is read.

    Args:
        file: the one file of weights, beside its configuration.
        tensors: what is in it.
    """
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name in tensors}
    weights = hashlib.sha256(length + header)
    for name in sorted(places, key=places.__getitem__):
        weights.update(tensors[name].cpu().contiguous().view(torch.uint8).numpy().data)
    config = hashlib.sha256((file.parent / CONFIG_FILE).read_bytes())
    return {CONFIG_FILE: config.hexdigest(), file.name: weights.hexdigest()}


def joined(*hashes: str) -> str:
    """Return the sha256 of a text with a line for each of an adapter's files: its sha256 in hex."""
    lines = "".join(f"{sha256}\n" for sha256 in hashes)
    return hashlib.sha256(lines.encode()).hexdigest()
