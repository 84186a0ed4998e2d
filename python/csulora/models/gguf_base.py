"""The base model that a GGUF LoRA file must fit: its architecture, head counts and weight matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load

from csulora.errors import InputError, RefusedError
from csulora.io.files import parse_json, read_regular, to_json
from csulora.io.hub import local_path
from csulora.models import gguf_layout, gguf_parts, names
from csulora.models.gguf_file import GGUFFile
from csulora.models.gguf_layout import EMBEDDING, HEAD, K_PROJ, Architecture

_LARGEST_CONFIG = 16 << 20  # bytes
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class BaseModel:
    """What is needed of a base model to write and to read GGUF LoRA files for it.

    Attributes:
        path: where it was read from.
        architecture: how llama.cpp lays it out.
        heads: number of query heads; ``kv_heads``: of key and value heads.
        shapes: (out, in) of every weight matrix that llama.cpp has a name for, by module. Without the output
            head if that is the token embedding.
        name: what the model calls itself.
        license: its licence, if it says so.
    """

    path: Path
    architecture: Architecture
    heads: int
    kv_heads: int
    shapes: dict[str, tuple[int, int]]
    name: str
    license: str | None = None

    def __post_init__(self) -> None:
        """Check that rows can be reordered head by head."""
        for module, (rows, _) in self.shapes.items():
            if self.architecture.is_permuted(module) and rows % (2 * self._heads_of(module)):
                raise InputError(
                    f"{self.path}: {module} has {rows} rows, which are not {self._heads_of(module)} heads of even size"
                )

    @classmethod
    def open(cls, source: str | Path) -> BaseModel:
        """Read a GGUF file's header, or ``config.json`` in a Hugging Face model directory or repository.

        Of a GGUF model in several files, the first is named and the others lie beside it.

        Raises:
            InputError: neither is there, or it is malformed.
            RefusedError: the architecture is not supported.
        """
        path = local_path(source, ["config.json", "README.md"])
        return _from_config(path) if path.is_dir() else cls.of_files(gguf_parts.open_parts(path))

    @classmethod
    def of_files(cls, files: Sequence[GGUFFile]) -> BaseModel:
        """Describe the model in an open GGUF file, or in all of its parts."""
        file = files[0]
        _check_model_file(file, len(files))
        architecture = gguf_layout.architecture(file.text("general.architecture"), str(file.path))
        heads = _metadata_count(file, f"{architecture.name}.attention.head_count")
        kv_heads = _metadata_count(file, f"{architecture.name}.attention.head_count_kv", heads)
        shapes = {}
        for tensor, info in (named for part in files for named in part.tensors.items()):
            module = architecture.module_name(tensor.removesuffix(names.WEIGHT))
            if module and tensor.endswith(names.WEIGHT) and len(info.shape) == 2:
                shapes[module] = (info.shape[0], info.shape[1])
        name = file.text("general.name") or file.path.stem
        return cls(file.path, architecture, heads, kv_heads, shapes, name, file.text("general.license"))

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return HEAD not in self.shapes

    @property
    def identity(self) -> str:
        """Hex sha256 over all that a LoRA file for this model depends on."""
        document = {
            "architecture": self.architecture.name,
            "heads": [self.heads, self.kv_heads],
            "shapes": self.shapes,
            "name": self.name,
            "license": self.license,
        }
        return hashlib.sha256(to_json(document).encode()).hexdigest()

    def to_gguf_rows(self, module: str, matrix: torch.Tensor) -> torch.Tensor:
        """Put the rows of a module's weight, or of a factor b of its update, in llama.cpp's order."""
        if not self.architecture.is_permuted(module):
            return matrix
        return gguf_layout.to_rotary_order(matrix, self._heads_of(module))

    def from_gguf_rows(self, module: str, matrix: torch.Tensor) -> torch.Tensor:
        """Undo `to_gguf_rows`."""
        if not self.architecture.is_permuted(module):
            return matrix
        return gguf_layout.from_rotary_order(matrix, self._heads_of(module))

    def _heads_of(self, module: str) -> int:
        return self.kv_heads if module.endswith(K_PROJ) else self.heads


def _check_model_file(file: GGUFFile, parts: int) -> None:
    kind = file.text("general.type")
    if kind not in (None, "model"):
        raise InputError(f"{file.path}: general.type is {kind!r}; a model is needed")
    if (file.integer("split.count") or 1) != parts:
        raise RefusedError(f"{file.path}: one part of several; join them with llama-gguf-split --merge first")


def _metadata_count(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.integer(key)
    return _count(default if value is None else value, f"{file.path}: metadata {key}")


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} is {value}; a positive number is needed")
    return value


def _from_config(directory: Path) -> BaseModel:
    path = directory / "config.json"
    config = parse_json(read_regular(path, _LARGEST_CONFIG), path)
    architecture = gguf_layout.architecture_of_model_type(config.get("model_type"), str(path))

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key)
        return _count(default if value is None else value, f"{path}: {key}")

    width, hidden, layers = count("hidden_size"), count("intermediate_size"), count("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers is {layers}; at most {_MOST_LAYERS} are possible")
    heads = count("num_attention_heads")
    kv_heads = count("num_key_value_heads", heads)
    head = count("head_dim", width // heads)
    in_layer = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.qkv_proj": ((heads + 2 * kv_heads) * head, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.gate_up_proj": (2 * hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    shapes = {f"model.layers.{layer}.{part}": in_layer[part] for layer in range(layers) for part in architecture.parts}
    shapes[EMBEDDING] = (count("vocab_size"), width)
    if config.get("tie_word_embeddings", True) is False:
        shapes[HEAD] = shapes[EMBEDDING]
    name = directory.resolve().name
    return BaseModel(directory, architecture, heads, kv_heads, shapes, name, _license(directory / "README.md"))


def _license(card: Path) -> str | None:
    """The licence that a model card states, if there is a card and it can be read."""
    try:
        value = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # of the card's text, of its YAML, of its encoding: none of them matters here
        return None
    return value if isinstance(value, str) else None
