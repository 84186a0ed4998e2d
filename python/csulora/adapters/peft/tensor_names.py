"""Names of the tensors in ``adapter_model.safetensors``: plain LoRA's, and why others are refused."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from csulora.adapters.peft import diagnosis
from csulora.errors import NotPlainLoraError
from csulora.models.names import kind_of

PREFIX = "base_model.model."
COPY = "copy"  # in place of a factor: a base matrix that was saved with the adapter

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.-]{1,400})\."
    r"(?P<factor>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)"
)
_COPY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.-]{1,400}?)(?:\.base_layer)?\.weight")

# Where PEFT keeps the factors of an experts module's first parameter, if a second one is adapted.
_STACKED = re.compile(r"(?<=\.experts)\.base_layer$")

# What else is known to stand in adapter files; the first that a name contains explains the refusal.
_FOREIGN = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "lora_mag": "it belongs to DoRA",
    "lora_diag": "it belongs to KaSA",
    "lora_A.bias": "the factors have biases",
    "lora_B.bias": "the factors have biases",
    "modules_to_save": "whole modules were trained and are replaced",
    "token_adapter": "rows of an embedding were trained and are replaced",
    "trainable_tokens": "rows of an embedding were trained and are replaced",
    "base_layer": "it is a weight of the base model; save the adapter with save_embedding_layers=False",
    ".bias": "biases of the base model were trained too",
    "lora_": "it is neither lora_A nor lora_B as PEFT names them on disk",
}


def module_and_factor(name: str, path: Path) -> tuple[str, str]:
    """Split a tensor's name; the factor is `COPY` for an embedding or a head that was saved whole.

    Raises:
        RefusedError: the name is not one of plain LoRA's.
    """
    found = _split(name)
    if found is None:
        raise NotPlainLoraError(f"{path}: tensor {name} is not part of plain LoRA: {_why_foreign(name)}")
    return found


@lru_cache(maxsize=4096)  # a server's adapters have the same names, and each is split twice
def _split(name: str) -> tuple[str, str] | None:
    for pattern in (_TENSOR, _COPY):
        found = pattern.fullmatch(name)
        if found is None or not _is_plain(found["module"]) or diagnosis.of_name(name, PREFIX):
            continue
        if pattern is _TENSOR:
            return found["module"], found["factor"]
        if kind_of(found["module"]) != "linear":
            return found["module"], COPY
    return None


def _is_plain(module: str) -> bool:
    return not any(part in _STACKED.sub("", module) for part in ("base_layer", "lora_", "base_model."))


def _why_foreign(name: str) -> str:
    if (known := diagnosis.of_name(name, PREFIX)) is not None:
        return known
    if not name.startswith(PREFIX) or name.startswith(PREFIX, len(PREFIX)):
        return f"its name does not start with {PREFIX} once"
    for fragment, reason in _FOREIGN.items():
        if fragment in name:
            return reason
    return "csulora knows no such tensor"
