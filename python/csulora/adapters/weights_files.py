"""The safetensors files of an adapter: read once, after the headers were checked, never mapped; and their hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from csulora.adapters.lora import Adapter
from csulora.errors import InputError, TooLargeError
from csulora.io.files import open_regular, parse_json

CONFIG_FILE = "adapter_config.json"  # PEFT's and mlx-lm's alike
LARGEST_CONFIG = 16 << 20  # bytes; a config with a rank and an alpha for each of 10,000 modules has 2 MiB
LARGEST_WEIGHTS = 16 << 30  # bytes, of all files of an adapter together
_LONGEST_HEADER = 64 << 20  # bytes, of all files together; that of the largest adapter that is read has 23 MiB
_MOST_TENSORS = 1 << 18  # two factors for each of 256 experts, three projections and 60 layers are 92,160
MOST_UPDATES = _MOST_TENSORS // 2  # that an adapter may have; fused factors hold many of them in two tensors
_HASHED_ASIDE = 4 << 20  # bytes from which on it pays to start a thread

CheckName = Callable[[str, Path], object]
"""Raises unless a tensor of that name may stand in that file."""


def read_bytes(paths: Sequence[Path], check_name: CheckName) -> list[bytes]:
    """Return the bytes of an adapter's files; no memory is taken for the data of a file with a bad header."""
    found: list[bytes] = []
    left = _Left(_LONGEST_HEADER, _MOST_TENSORS)
    for path in paths:
        try:
            with open_regular(path, LARGEST_WEIGHTS - sum(map(len, found))) as file:
                size = os.fstat(file.fileno()).st_size
                _check_header(file, size, path, check_name, left)
                file.seek(0)
                found.append(file.read(size))
        except OSError as error:
            raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    return found


@dataclass
class _Left:
    """What the headers of an adapter's further files may hold."""

    header: int  # bytes
    tensors: int


def _check_header(file: BufferedReader, size: int, path: Path, check_name: CheckName, left: _Left) -> None:
    """Check what a safetensors header says of the file before its data are read.

    It is read and not mapped: a process dies of a mapped file that somebody makes shorter.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, left.header):
        raise InputError(f"{path}: not a readable safetensors file: its header of {length} bytes is too long")
    header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    if len(header) > left.tensors:
        raise TooLargeError(f"{path}: holds {len(header)} tensors; at most {_MOST_TENSORS} are read")
    left.header -= length
    left.tensors -= len(header)
    for name in header:
        check_name(name, path)
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a readable safetensors file: a tensor has no data_offsets") from error
    if end != size - 8 - length:
        raise InputError(
            f"{path}: not a readable safetensors file: its header speaks of {end} bytes of data, and it has "
            f"{size - 8 - length}; is it complete?"
        )


def tensors_in(files: Mapping[Path, bytes]) -> dict[str, torch.Tensor]:
    """Return the tensors of all files' bytes, by name; raises `InputError` if one stands in two files."""
    tensors: dict[str, torch.Tensor] = {}
    for path, content in files.items():
        try:
            found = safetensors.torch.load(content)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype torch lacks
            raise InputError(f"{path}: not a readable safetensors file: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise InputError(f"{path}: holds {min(twice)}, and so does another file of the adapter")
        tensors |= found
    return tensors


def with_sha256(assemble: Callable[[], Adapter], files: Mapping[str, bytes]) -> Adapter:
    """Return an adapter with the hashes of its files, which large ones are computed for while it is assembled.

    Args:
        assemble: makes the adapter without them.
        files: the bytes of its configuration, then of its weights files, by name.
    """
    is_small = sum(map(len, files.values())) < _HASHED_ASIDE
    # Hashing takes as long as all the rest, and another core.
    with nullcontext() if is_small else ThreadPoolExecutor(max_workers=1) as pool:
        hashing = pool.submit(_hashed, files) if pool else None
        adapter = assemble()
        found = hashing.result() if hashing else _hashed(files)
    return replace(adapter, sha256=joined(*found.values()), files=found)


def _hashed(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


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
