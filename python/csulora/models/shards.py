"""The safetensors files of a model or an adapter: one file, shards with an index, or shards alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular

_STEM = "model"
_LARGEST_INDEX = 64 << 20  # bytes; the index of 100,000 tensors has about 10 MiB
_SHARD = re.compile(r"(?P<stem>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def single_name(stem: str) -> str:
    """Return what one file with all weights is called: ``model.safetensors`` for ``model``."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """Return what the index of several files is called."""
    return f"{stem}.safetensors.index.json"


def check_is_model(directory: Path) -> None:
    """Raise `InputError` for a directory that holds an adapter in place of a model."""
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise InputError(f"{directory}: holds an adapter; name the model's directory, a GGUF file or a hub id")


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a directory, and what their index says: tensor -> file name."""

    files: list[Path]
    shard_of: Mapping[str, str] = field(default_factory=dict)

    def check_complete(self, tensors: Collection[str]) -> None:
        """Raise `InputError` unless the files hold all tensors that the index names."""
        for tensor, shard in self.shard_of.items():
            if tensor not in tensors:
                raise InputError(f"{self.files[0].parent / shard}: tensor {tensor} is missing, but the index names it")


def weight_files(directory: Path, stem: str) -> WeightFiles:
    """Return the files that hold the weights called ``stem``: one, the shards of an index, or shards alone; else none.

    Raises:
        InputError: a shard is missing, or the index is malformed.
    """
    single, index = directory / single_name(stem), directory / index_name(stem)
    if single.is_file():  # `transformers`, too, looks for it first
        return WeightFiles([single])
    if not index.is_file():
        return WeightFiles(_shards_without_index(directory, stem))
    shard_of = _read_index(index)
    return WeightFiles([directory / shard for shard in sorted(set(shard_of.values()))], shard_of)


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what its header says."""

    file: Path
    shape: list[int]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor's place and header, by name, in the order of their names."""
    found = weight_files(directory, _STEM)
    if not found.files:
        raise InputError(
            f"{directory}: holds neither {single_name(_STEM)} nor {index_name(_STEM)}; convert it to safetensors first"
        )
    tensors = _joined(found.files)
    found.check_complete(tensors)
    return dict(sorted(tensors.items()))


def _shards_without_index(directory: Path, stem: str) -> list[Path]:
    """Return the shards of a directory whose index is missing, if their names say that they are all there."""
    matches = {path: _SHARD.fullmatch(path.name) for path in sorted(directory.iterdir())}
    found = {path: match for path, match in matches.items() if match and match["stem"] == stem}
    counts = {int(match["count"]) for match in found.values()}
    numbers = [int(match["number"]) for match in found.values()]
    if found and (len(counts) > 1 or numbers != list(range(1, max(counts) + 1))):
        raise InputError(
            f"{directory}: holds shards {numbers} of {sorted(counts)} and no {index_name(stem)}; is it complete?"
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
            raise InputError(f"{index.parent / shard}: missing, but {index.name} names it")
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
