"""Checkpoints, Hugging Face directories or GGUF files: which weight matrices there are, and one of them at a time."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from csulora.errors import InputError, RefusedError
from csulora.io.files import parse_json, read_regular
from csulora.io.hub import local_path
from csulora.models import experts, gguf_layout, gguf_quants, names, renamings, storage
from csulora.models.gguf_base import BaseModel, expert_parts
from csulora.models.gguf_file import GGUFFile
from csulora.models.rounding import RoundingVariances
from csulora.models.shards import check_is_model, stored_tensors
from csulora.models.storage import Contents, Weight
from csulora.policy.globs import matches
from csulora.subspace.expert_layout import ExpertLayout

_LARGEST_JSON = 64 << 20  # bytes; the index of 100,000 tensors has about 10 MiB
READABLE = (*storage.FLOATING, *storage.SCALED, *gguf_quants.QUANTISED)


class Checkpoint:
    """The 2-D weights of a model, by module name (the tensor's name less ``.weight``).

    Nothing but headers is read until `load` is called.
    """

    def __init__(
        self,
        name: str,
        files: list[Path],
        config: dict[str, Any],
        weights: dict[str, Weight],
        others: dict[str, list[int]],
    ) -> None:
        """Use `Checkpoint.open`; ``others`` are the shapes of all tensors that are not 2-D weights."""
        self.name = name
        self.files = files
        self.config = config
        self.weights = weights
        self._others = others

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory, a GGUF file or a hub id, see `csulora.io.hub.local_path`.

        Raises:
            InputError: nothing usable is there, or it cannot be reached.
            RefusedError: a GGUF file's architecture is not supported.
        """
        local = Path(source)
        # Some repositories hold the weights a second time, under another name or in a subdirectory.
        directory = local_path(source, ["*.safetensors", "*.json"], ["*/*", "consolidated*"])
        if directory.is_file():
            return GGUFCheckpoint(GGUFFile.map(directory))
        name = local.resolve().name if local.exists() else str(source)
        if not directory.is_dir():
            raise InputError(f"{directory}: not a directory; name a model directory, a GGUF file or a hub id")
        config_file = directory / "config.json"
        check_is_model(directory)
        config = _read_json(config_file)
        model_type = config.get("model_type")
        if not isinstance(model_type, str | None):
            raise InputError(f"{config_file}: model_type is {model_type!r}; it must be a name")
        tensors = stored_tensors(directory)
        contents = Contents.of(tensors, config, directory, experts.layout_of(_model_types(config)))
        files = [config_file, *sorted({tensor.file for tensor in tensors.values()})]
        return cls(name, files, config, contents.weights, contents.others)

    @property
    def aliases(self) -> dict[str, str]:
        """Names under which a tied weight is known besides its own: ``lm_head`` of a tied model that stores no head."""
        embedding = names.token_embedding(self.weights)
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        is_tied = self.config.get("tie_word_embeddings", inner) is not False  # the model's own word comes first
        has_head = any(names.kind_of(module) == "head" for module in self.weights)
        return {"lm_head": embedding} if embedding and is_tied and not has_head else {}

    @property
    def expert_layout(self) -> ExpertLayout | None:
        """How the model lays out its experts in memory; None if it has none."""
        return experts.layout_of(_model_types(self.config)) if any(map(names.is_expert, self.weights)) else None

    @cached_property
    def names_in_memory(self) -> dict[str, str]:
        """What transformers calls modules in memory, where that is not their name on disk: name -> module.

        Raises:
            RefusedError: two modules have one name in memory.
        """
        try:
            return renamings.names_in_memory(self.config, self.weights)
        except RefusedError as error:
            raise RefusedError(f"{self.name}: {error}") from error

    def select(self, patterns: Iterable[str]) -> list[str]:
        """Return the modules that any glob matches, or all linear ones if there is no glob.

        Raises:
            InputError: a glob matches nothing.
        """
        patterns = list(patterns)
        if not patterns:
            usual = [module for module in self.weights if names.kind_of(module) == "linear"]
            if not usual:
                raise InputError(
                    f"{self.name}: holds no 2-D weight of a linear module; name the modules (--modules), "
                    "or another model if it has none"
                )
            return usual
        selected: set[str] = set()
        for pattern in patterns:
            found = {module for module in self.weights if matches(module, pattern)}
            further = self.names_in_memory | self.aliases
            found |= {module for name, module in further.items() if matches(name, pattern)}
            if not found:
                raise InputError(
                    f"{self.name}: no 2-D weight matches the module pattern {pattern!r}{self._why(pattern)}"
                )
            selected |= found
        return sorted(selected)

    def left_out(self, modules: Collection[str]) -> dict[str, list[str]]:
        """Return the weights beside ``modules`` that LoRA could target, by kind, see `names.kind_of`.

        ``stacked`` weights have three dimensions or more: experts that are stored together, and convolutions.
        """
        found: dict[str, list[str]] = {}
        for module in sorted(set(self.weights) - set(modules)):
            found.setdefault(names.kind_of(module), []).append(module)
        stacked = sorted(name for name, shape in self._others.items() if len(shape) > 2)
        return found | ({"stacked": stacked} if stacked else {})

    def _why(self, pattern: str) -> str:
        other = next((name for name in self._others if matches(name, pattern)), None)
        if other:
            return f"; {other} is {self._others[other]}, and only matrices called *.weight have a subspace"
        return f"; there is {min(self.weights)}, for instance" if self.weights else ""

    def load(self, module: str) -> tuple[torch.Tensor, str]:
        """Return one weight, (out, in), and the hex sha256 of its bytes as they are stored, see `storage.load`."""
        return storage.load(self.weights[module])

    def rounding_variances(self, module: str) -> RoundingVariances | None:
        """Return how far quantisation may have moved a weight's entries; None if the weight is not quantised."""
        return storage.rounding_variances(self.weights[module])

    @property
    def gguf_architecture(self) -> str:
        """What llama.cpp calls the model's architecture; raises `RefusedError` if csulora knows no name."""
        return gguf_layout.architecture_of_config(self.config, self.name).name


class GGUFCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: modules, shapes and order of rows are Hugging Face's."""

    def __init__(self, file: GGUFFile) -> None:
        """Describe an open file; use `Checkpoint.open`."""
        base = BaseModel.of_files([file])
        parts = dict(expert_parts([file], base.architecture))
        weights, pieces = {}, {}
        for module, shape in sorted(base.shapes.items()):
            part = parts.get(module)
            pieces[module] = [
                Weight(file.path, tensor, (rows, shape[1]), file.tensors[tensor].type.name, False, part=part)
                for tensor, rows in ((f"{name}{names.WEIGHT}", rows) for name, rows in base.heights(module).items())
            ]
            weights[module] = replace(max(pieces[module], key=_trouble), shape=shape)
        config = {"model_type": base.architecture.name, "tie_word_embeddings": base.is_tied}
        held = {weight.tensor for found in pieces.values() for weight in found}
        others = {name: list(info.shape) for name, info in file.tensors.items() if name not in held}
        super().__init__(file.path.name, [file.path], config, weights, others)
        self._file = file
        self._base = base
        self._pieces = pieces
        self._has_importance = any(key.startswith("quantize.imatrix.") for key in file.fields)

    def load(self, module: str) -> tuple[torch.Tensor, str]:
        """Return one weight, (out, in), and the hex sha256 of its values; raises `RefusedError` for imatrix quants.

        What is stored as floating point is hashed as a Hugging Face checkpoint would store it, with its rows in
        Hugging Face's order; what is quantised is dequantised to float32, and its blocks are hashed.
        """
        pieces = self._pieces[module]
        if all(weight.dtype in storage.FLOATING for weight in pieces):
            stored = _stacked([self._floating(weight) for weight in pieces])
            matrix = self._base.weight_from_gguf(module, stored).contiguous()
            return matrix, hashlib.sha256(matrix.view(torch.uint8).numpy().data).hexdigest()
        content = hashlib.sha256()
        stored = _stacked([self._values(weight, content) for weight in pieces])
        return self._base.weight_from_gguf(module, stored), content.hexdigest()

    def _floating(self, weight: Weight) -> torch.Tensor:
        return torch.frombuffer(self._bytes_of(weight), dtype=storage.FLOATING[weight.dtype]).reshape(weight.shape)

    def _values(self, weight: Weight, content: hashlib._Hash) -> torch.Tensor:
        """Return a tensor's values, float32, and add what is stored of it to ``content``."""
        data = self._bytes_of(weight)
        content.update(data)
        if weight.dtype in storage.FLOATING:  # beside one that is quantised
            return self._floating(weight).float()
        if self._has_importance and weight.dtype != "Q8_0":  # which ignores it
            raise RefusedError(
                f"{weight.file}: {weight.tensor} was quantised with an importance matrix, so how far its entries were "
                "moved does not follow from the file; use Q8_0 or a checkpoint that is not quantised"
            )
        values, scale = gguf_quants.dequantise(data, weight.shape, self._type_of(weight)), self._scale_of(weight)
        if scale != 1:
            content.update(struct.pack("<f", scale))
            values *= scale
        return values

    def rounding_variances(self, module: str) -> RoundingVariances | None:
        """Return how far quantisation may have moved a weight's entries; None if the weight is not quantised."""
        found = [self._variances(weight) for weight in self._pieces[module]]
        return RoundingVariances.stacked(found) if any(found) else None

    def _variances(self, weight: Weight) -> RoundingVariances | None:
        if weight.dtype in storage.FLOATING:
            return None
        found = gguf_quants.rounding_variances(self._bytes_of(weight), weight.shape, self._type_of(weight))
        return found.scaled(self._scale_of(weight))

    def _type_of(self, weight: Weight) -> GGMLQuantizationType:
        return self._file.tensors[weight.tensor].type

    def _scale_of(self, weight: Weight) -> float:
        """Return what llama.cpp multiplies a weight's products by: NVFP4 has a tensor of one scale, or one per expert.

        Raises:
            InputError: that tensor is no such one.
        """
        name = f"{weight.tensor.removesuffix(names.WEIGHT)}.scale"
        info = self._file.tensors.get(name)
        if weight.dtype != "NVFP4" or info is None:
            return 1.0
        expert, number = 0, 1
        if weight.part is not None:
            expert, number = weight.part.expert, self._file.tensors[weight.tensor].shape[0]
        if info.type.name != "F32" or math.prod(info.shape) != number:
            raise InputError(
                f"{weight.file}: {name} is {info.type.name} {list(info.shape)}; {number} float32 scales are needed; "
                "convert the model again"
            )
        scale = float(torch.frombuffer(self._file.bytes_of(name), dtype=torch.float32)[expert])
        if not math.isfinite(scale):
            raise InputError(f"{weight.file}: {name} holds a scale that is no number; fetch the file again")
        return scale

    def _bytes_of(self, weight: Weight) -> memoryview:
        """Return where a weight lies in the mapped file: its rows follow each other, whatever their type."""
        data = self._file.bytes_of(weight.tensor)
        if weight.part is None:
            return data
        experts, rows, _ = self._file.tensors[weight.tensor].shape
        row = len(data) // (experts * rows)
        first = weight.part.expert * rows
        return data[(first + weight.part.rows.start) * row : (first + weight.part.rows.stop) * row]

    @property
    def expert_layout(self) -> ExpertLayout | None:
        """How transformers lays out the model's experts in memory; None if it has none."""
        return self._base.architecture.expert_layout if any(map(names.is_expert, self.weights)) else None

    @property
    def gguf_architecture(self) -> str:
        """What the file says."""
        return self._base.architecture.name


def _stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Return matrices below one another; a single one is not copied."""
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


def _trouble(weight: Weight) -> int:
    """Rank storage types: what is not readable is worse than what is quantised, and that than floating point."""
    return (weight.dtype not in READABLE) + (weight.dtype not in storage.FLOATING)


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the model's type, and that of the language model within one that also sees or hears."""
    text = config.get("text_config")
    found = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
    return [model_type for model_type in found if isinstance(model_type, str)]


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_regular(path, _LARGEST_JSON), path)
