"""How llama.cpp lays out a model: which architectures are known, what tensors are called, how rows are ordered.

An architecture is listed only if a test compares llama.cpp's logits with PEFT's for it. The names of tensors in
layers come from gguf's own table. Modules go by their names in Hugging Face's causal language models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, TensorNameMap

from csulora.errors import BuildError, RefusedError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Q_PROJ, K_PROJ = "self_attn.q_proj", "self_attn.k_proj"

_SEPARATE = (
    Q_PROJ,
    K_PROJ,
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

_OUTSIDE = {EMBEDDING: TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD], HEAD: TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}

# At most four digits and no leading zero: every name has one spelling.
_IN_LAYER = re.compile(r"(?P<stem>model\.layers|blk)\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<part>.+)")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: what GGUF's ``general.architecture`` says.
        parts: the weight matrices of a layer, by the end of their modules' names.
        permuted: whether rows of q_proj and k_proj stand in llama.cpp's own order.
    """

    name: str
    parts: tuple[str, ...] = _SEPARATE
    permuted: bool = False

    def tensor_name(self, module: str) -> str | None:
        """Return a module's GGUF name less ``.weight``; None if llama.cpp has no such weight matrix."""
        return _OUTSIDE.get(module) or _rename(module, "model.layers", "blk", _part_names(self))

    def module_name(self, tensor: str) -> str | None:
        """Return the module of a GGUF name less ``.weight``; None if it is no weight matrix of a known module."""
        parts = {name: part for part, name in _part_names(self).items()}
        outside = {name: module for module, name in _OUTSIDE.items()}
        return outside.get(tensor) or _rename(tensor, "blk", "model.layers", parts)

    def is_permuted(self, module: str) -> bool:
        """Whether the rows of this module's weight are in another order in GGUF files."""
        return self.permuted and module.endswith((Q_PROJ, K_PROJ))


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", permuted=True),
        Architecture("smollm3", permuted=True),
        Architecture("granite", permuted=True),
        Architecture("olmo2"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("gemma"),
        Architecture("gemma2"),
        Architecture("gemma3"),
        Architecture("phi3", parts=_FUSED),
    )
}

# What `transformers` calls the models that llama.cpp runs as one of these architectures.
_MODEL_TYPES = {name: name for name in _ARCHITECTURES if name != "gemma3"} | {
    "mistral": "llama",
    "gemma3_text": "gemma3",
}


def architecture(name: str | None, where: str) -> Architecture:
    """Look up an architecture by its GGUF name; ``where`` is the file that says it.

    Raises:
        RefusedError: it is not on the list.
    """
    if name not in _ARCHITECTURES:
        raise RefusedError(
            f"{where}: architecture {_shown(name)} is not supported; supported are {_listed(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[name]


def architecture_of_model_type(model_type: object, where: str) -> Architecture:
    """Look up an architecture by a Hugging Face config's ``model_type``.

    Raises:
        RefusedError: it is not on the list.
    """
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise RefusedError(
            f"{where}: no GGUF layout is known for model_type {_shown(model_type)}; known are {_listed(_MODEL_TYPES)}"
        )
    return _ARCHITECTURES[_MODEL_TYPES[model_type]]


def to_rotary_order(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from (first halves, second halves) to llama.cpp's pairs.

    Hugging Face rotates row i of a head of d rows together with row i + d/2, llama.cpp row 2i with row 2i + 1.
    """
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def from_rotary_order(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `to_rotary_order`."""
    return matrix.reshape(heads, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def _rename(name: str, stem: str, new_stem: str, parts: dict[str, str]) -> str | None:
    found = _IN_LAYER.fullmatch(name)
    part = parts.get(found["part"]) if found and found["stem"] == stem else None
    return f"{new_stem}.{found['layer']}.{part}" if found and part else None


@cache
def _part_names(architecture: Architecture) -> dict[str, str]:
    """What follows the layer's number in GGUF names, by part."""
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = TensorNameMap(MODEL_ARCH(arch), 1)
    names = {}
    for part in architecture.parts:
        name = table.get_name(f"model.layers.0.{part}")
        if name is None:
            raise BuildError(f"the installed gguf has no name for {part} of {architecture.name}; install gguf 0.19")
        names[part] = name.removeprefix("blk.0.")
    return names


def _shown(name: object) -> str:
    return repr(name)[:80]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
