"""The safetensors files of a checkpoint directory: one file, shards with an index, or shards alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 64 << 20  # bytes; the index of 100,000 tensors has about 10 MiB
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what its header says."""

    file: Path
    shape: list[int]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor's place and header, by name, in the order of their names."""
    single, index = directory / _SINGLE_FILE, directory / _INDEX_FILE
    if single.is_file():  # `transformers`, too, looks for it first
        tensors = _tensors_in(single)
    elif index.is_file():
        tensors = _tensors_in_shards(index)
    elif shards := _shards_without_index(directory):
        tensors = _joined(shards)
    else:
        raise InputError(
            f"{directory}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; convert it to safetensors first"
        )
    return dict(sorted(tensors.items()))


def _tensors_in_shards(index: Path) -> dict[str, StoredTensor]:
    shard_of = _read_index(index)
    tensors = _joined([index.parent / shard for shard in sorted(set(shard_of.values()))])
    for tensor, shard in shard_of.items():
        if tensor not in tensors:
            raise InputError(f"{index.parent / shard}: tensor {tensor} is missing, but {_INDEX_FILE} names it")
    return tensors


def _shards_without_index(directory: Path) -> list[Path]:
    """Return the shards of a directory whose index is missing, if their names say that they are all there."""
    found = {path: match for path in sorted(directory.iterdir()) if (match := _SHARD.fullmatch(path.name))}
    counts = {int(match["count"]) for match in found.values()}
    numbers = [int(match["number"]) for match in found.values()]
    if found and (len(counts) > 1 or numbers != list(range(1, max(counts) + 1))):
        raise InputError(
            f"{directory}: holds shards {numbers} of {sorted(counts)} and no {_INDEX_FILE}; is it complete?"
        )
    return list(found)


def _joined(shards: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        found = _tensors_in(shard)
        for tensor in found.keys() & tensors.keys():
            raise InputError(f"{shard}: holds {tensor}, and so does {tensors[tensor].file.name}")
        tensors |= found
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, by name."""
    shard_of = parse_json(read_regular(index, _LARGEST_INDEX), index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for shard in shard_of.values():
        if Path(shard).name != shard:
            raise InputError(f"{index}: {shard} lies outside the directory")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard}: missing, but {_INDEX_FILE} names it")
    return shard_of


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            headers = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: StoredTensor(file, header.get_shape(), header.get_dtype()) for name, header in headers.items()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from error
