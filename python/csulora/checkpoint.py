"""Checkpoints in Hugging Face's layout: which weight matrices there are, and one of them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from csulora import names
from csulora.errors import InputError
from csulora.files import parse_json

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Weight:
    """Where a 2-D weight lies and what it looks like, oriented (out, in)."""

    file: Path
    tensor: str
    shape: tuple[int, int]
    dtype: str  # as safetensors calls it
    transposed: bool  # stored as (in, out)


class Checkpoint:
    """The 2-D weights of a model, by module name (the tensor's name less ``.weight``).

    Nothing but headers is read until `load` is called.
    """

    def __init__(self, name: str, config: dict[str, Any], weights: dict[str, Weight]) -> None:
        """Use `Checkpoint.open`."""
        self.name = name
        self.config = config
        self.weights = weights

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory or a Hugging Face Hub id.

        Raises:
            InputError: nothing usable is there, or it cannot be reached.
        """
        directory = Path(source) if Path(source).exists() else _download(str(source))
        if not directory.is_dir():
            raise InputError(f"{directory}: not a directory; name a model directory or a hub id")
        config = _read_json(directory / "config.json")
        files = _tensor_files(directory)
        weights: dict[str, Weight] = {}
        for file in sorted(set(files)):
            weights.update(_weights_in(file, config.get("model_type")))
        if not weights:
            raise InputError(f"{directory}: holds no 2-D weight; is it a language model?")
        return cls(Path(source).name, config, dict(sorted(weights.items())))

    @property
    def aliases(self) -> dict[str, str]:
        """Names under which a tied weight is known besides its own: ``lm_head`` of a tied model."""
        embedding = names.token_embedding(self.weights)
        tied = self.config.get("tie_word_embeddings", True) is not False
        return {"lm_head": embedding} if embedding and tied and "lm_head" not in self.weights else {}

    def select(self, patterns: Iterable[str]) -> list[str]:
        """Return the modules that any glob matches, or attention and MLP if there is no glob.

        Raises:
            InputError: a glob matches nothing.
        """
        patterns = list(patterns)
        if not patterns:
            return [module for module in self.weights if names.is_attention_or_mlp(module)]
        selected: set[str] = set()
        for pattern in patterns:
            found = {module for module in self.weights if names.matches(module, pattern)}
            found |= {target for alias, target in self.aliases.items() if names.matches(alias, pattern)}
            if not found:
                raise InputError(f"{self.name}: no 2-D weight matches the module pattern {pattern!r}")
            selected |= found
        return sorted(selected)

    def load(self, module: str) -> tuple[torch.Tensor, str]:
        """Map one weight, (out, in), in its storage type, and hash its bytes as they are stored.

        Returns:
            The matrix, a view of the mapped file that keeps the mapping alive, and the hex sha256.
        """
        weight = self.weights[module]
        try:
            with safe_open(weight.file, framework="pt") as file:
                stored: torch.Tensor = file.get_tensor(weight.tensor)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{weight.file}: cannot read {weight.tensor}: {error}") from error
        digest = hashlib.sha256(stored.view(torch.uint8).numpy().data).hexdigest()
        return stored.t() if weight.transposed else stored, digest


def check_same_architecture(base: Checkpoint, aligned: Checkpoint, modules: Iterable[str]) -> None:
    """Raise `InputError` unless both checkpoints have these modules, in the same shapes, for the same model."""
    for key in ("model_type", "architectures"):
        ours, theirs = base.config.get(key), aligned.config.get(key)
        if ours != theirs:
            raise InputError(
                f"config.json: {key} is {ours} in base {base.name} and {theirs} in aligned {aligned.name}; "
                "both must be the same architecture"
            )
    for module in modules:
        for here, there in ((base, aligned), (aligned, base)):
            if module not in here.weights:
                raise InputError(f"{here.name}: tensor {module}.weight is missing, but {there.name} has it")
        ours_shape, theirs_shape = base.weights[module].shape, aligned.weights[module].shape
        if ours_shape != theirs_shape:
            raise InputError(
                f"tensor {module}.weight is {list(ours_shape)} in base {base.name} "
                f"and {list(theirs_shape)} in aligned {aligned.name}"
            )


def _download(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub client raises a dozen unrelated types, those of its HTTP library among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repo}: neither a local directory nor a model that could be fetched from the Hugging Face Hub "
            f"({reason}); check the path, the id and the network"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a checkpoint needs it") from None


def _tensor_files(directory: Path) -> list[Path]:
    if (directory / _INDEX_FILE).is_file():
        shards = _read_json(directory / _INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"{directory / _INDEX_FILE}: weight_map must map tensor names to file names")
        for shard in shards.values():
            if Path(shard).name != shard:
                raise InputError(f"{directory / _INDEX_FILE}: {shard} lies outside the directory")
            if not (directory / shard).is_file():
                raise InputError(f"{directory / shard}: missing, but {_INDEX_FILE} names it")
        return [directory / shard for shard in shards.values()]
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    raise InputError(f"{directory}: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there; convert to safetensors first")


def _weights_in(file: Path, model_type: str | None) -> dict[str, Weight]:
    weights = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118 - not a mapping
                header = tensors.get_slice(tensor)
                shape, dtype = header.get_shape(), header.get_dtype()
                module = tensor.removesuffix(names.WEIGHT)
                if module == tensor or len(shape) != 2 or dtype not in _DTYPES:
                    continue
                transposed = names.is_conv1d(module, model_type)
                oriented = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
                weights[module] = Weight(file, tensor, oriented, dtype, transposed)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from error
    return weights
