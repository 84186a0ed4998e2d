"""Adapter directories of mlx-lm: ``adapter_config.json`` and ``adapters.safetensors``.

The factors lie the other way round than PEFT's: ``<module>.lora_a`` is (in, r) and ``<module>.lora_b`` (r, out). The
scale is a factor of its own, which no rank divides. What is written has scale 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from csulora.adapters.factors import check_matrix, of_one_dtype
from csulora.adapters.lora import Adapter, LoraModule, is_finite
from csulora.adapters.mlx.config import Settings, read_config, written_config
from csulora.adapters.peft.config import base_model_name
from csulora.adapters.weights_files import CONFIG_FILE, LARGEST_CONFIG, read_weights, tensors_in, with_hashes
from csulora.errors import AmbiguousError, HostLimitError, InputError, NotPlainLoraError
from csulora.io.files import parse_json, read_regular, to_json
from csulora.io.tensors import save_tensors
from csulora.models.names import kind_of, parse_expert

WEIGHTS_FILE = "adapters.safetensors"

_TENSOR = re.compile(r"(?P<module>[A-Za-z0-9_.-]{1,400})\.(?P<factor>lora_[ab])")

# Last parts of names that are known to stand in such files; they explain the refusal.
_FOREIGN = {
    "m": "it belongs to DoRA",
    "weight": "a whole weight was trained and is replaced",
    "bias": "biases of the base model were trained too",
    "scales": "it belongs to a quantised weight of the base model",
    "biases": "it belongs to a quantised weight of the base model",
}
_PEFT_FACTOR = re.compile(r"lora_(A|B|embedding_A|embedding_B)")
_SCALED = ("falcon_h1", "falcon-h1")  # transformers' and llama.cpp's name for it
_LAYER = re.compile(r".*?\.\d+(?=\.)")
_WRAPPED = re.compile(r"^model\.language_model\.")
_TIED = (
    "where embedding and head are tied mlx-lm applies it to both, and the file does not say whether they are; leave "
    "it out of the keys"
)


def read(directory: Path) -> Adapter:
    """Read a directory of mlx-lm. The bytes that are hashed are the bytes that are used.

    Raises:
        InputError: a file is missing or malformed, or the two contradict each other.
        RefusedError: the adapter is more or other than plain LoRA of linear layers.
    """
    config_file, weights_file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config_bytes = read_regular(config_file, LARGEST_CONFIG)
    settings = read_config(parse_json(config_bytes, config_file), config_file)
    weights = read_weights([weights_file], _module_and_factor)
    known = all(file.is_finite for file in weights)
    return with_hashes(_assembled(settings, tensors_in(weights), directory, known), config_bytes, weights)


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the factors under mlx-lm's names, scales folded into ``lora_b``, all padded to the largest rank."""
    rank = _rank(adapter)
    tensors = {}
    for name, module in by_their_names(adapter).items():
        filled = module.folded().padded(rank)  # mlx-lm has one rank for all modules
        tensors[f"{name}.lora_a"] = filled.a.t().contiguous()
        tensors[f"{name}.lora_b"] = filled.b.t().contiguous()
    return tensors


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Return the configuration under which `tensors_of` has scale 1."""
    base_model = base_model_name(adapter.config.get("base_model_name_or_path"))
    return written_config(_rank(adapter), sorted(by_their_names(adapter)), base_model)


def write(adapter: Adapter, directory: Path) -> dict[str, torch.Tensor]:
    """Write both files into an existing directory, and return the tensors as they are in the file.

    Raises:
        InputError: folding a scale into a factor overflows its storage type.
        RefusedError: the adapter updates an embedding, an expert, or a model whose weights mlx-lm scales.
    """
    check_model(adapter.modules, adapter.path)
    for name in adapter.modules:
        _check_kind(name, adapter.path)
        if parse_expert(name):
            raise HostLimitError(
                f"{adapter.path}: updates {name}, and mlx-lm keeps the factors of all experts in one tensor, which "
                "csulora does not write yet; write another format (--format peft)"
            )
    tensors = tensors_of(adapter)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"{adapter.path}: {name} with its scale does not fit {tensor.dtype}")
    config = to_json(config_of(adapter))
    (directory / CONFIG_FILE).write_text(config, encoding="utf-8", errors="backslashreplace")
    save_tensors(tensors, directory / WEIGHTS_FILE, {"format": "mlx"})
    return tensors


def by_their_names(adapter: Adapter) -> dict[str, LoraModule]:
    """Return the modules as mlx-lm calls them: a language model that also sees is wrapped the other way round."""
    return {_WRAPPED.sub("language_model.model.", name): module for name, module in adapter.modules.items()}


def check_model(modules: Collection[str], path: Path, model_type: str | None = None) -> None:
    """Raise `RefusedError` if modules are of a model whose weights mlx-lm scales, so that updates mean something else.

    Args:
        modules: names of its modules, as many as are known.
        path: what the message calls the adapter.
        model_type: the model's, if it is known.
    """
    layers = {layer for layer, found, _ in (name.partition(".mamba.") for name in modules) if found}
    side_by_side = any(f"{layer}.self_attn.q_proj" in modules for layer in layers)  # as in no other model
    if side_by_side or model_type in _SCALED:
        raise AmbiguousError(
            f"{path}: mlx-lm multiplies the weights of Falcon-H1 by constants of its own, so that their update is "
            "another one elsewhere; train and serve the adapter with PEFT"
        )


def _rank(adapter: Adapter) -> int:
    return max(module.rank for module in adapter.modules.values())


def _assembled(settings: Settings, tensors: Mapping[str, torch.Tensor], directory: Path, known_finite: bool) -> Adapter:
    path = directory / WEIGHTS_FILE
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name in sorted(tensors):
        module, factor = _module_and_factor(name, path)
        higher = "stacked experts cannot be corrected yet"
        check_matrix(name, tensors[name], path, higher=higher, empty="", known_finite=known_finite)
        factors.setdefault(module, {})[factor] = tensors[name]
    if not factors:
        raise InputError(f"{path}: holds no factor of an update")
    _check_layers(factors, settings, path)
    modules = {module: _module(module, found, settings, path) for module, found in factors.items()}
    config = {"base_model_name_or_path": settings.base_model, "task_type": "CAUSAL_LM"}
    return Adapter(modules, config, directory, "", format="mlx")


def _check_layers(modules: Collection[str], settings: Settings, path: Path) -> None:
    """Raise `RefusedError` for updates of more layers than mlx-lm makes room for, where keys do not name them whole."""
    layers = {
        found[0] for name in modules if (found := _LAYER.match(name)) and name not in (settings.keys or frozenset())
    }
    if 0 < settings.layers < len(layers):
        raise AmbiguousError(
            f"{path}: holds factors for {len(layers)} layers, and num_layers is {settings.layers}; versions of mlx-lm "
            f"disagree on what becomes of the others; set it to {len(layers)} if all were trained"
        )


def _module(name: str, factors: dict[str, torch.Tensor], settings: Settings, path: Path) -> LoraModule:
    for factor in ("lora_a", "lora_b"):
        if factor not in factors:
            raise InputError(f"{path}: {name}.{factor} is missing; an update needs both factors")
    if not settings.selects(name):
        raise AmbiguousError(
            f"{path}: holds factors for {name}, which the keys of adapter_config.json do not name; versions of mlx-lm "
            "disagree on whether to apply them"
        )
    a, b = of_one_dtype(factors["lora_a"], factors["lora_b"], name, path)
    if a.shape[1] != settings.rank or b.shape[0] != settings.rank:
        raise InputError(
            f"{path}: {name} has factors {list(a.shape)} and {list(b.shape)}, but the configuration says rank "
            f"{settings.rank}"
        )
    return LoraModule(b.t(), a.t(), settings.scale)


def _module_and_factor(name: str, path: Path) -> tuple[str, str]:
    """Split a tensor's name; raises `RefusedError` if it is not one of plain LoRA's."""
    found = _TENSOR.fullmatch(name)
    if found is None or "lora_" in found["module"]:
        reason = _FOREIGN.get(name.rpartition(".")[2], "it is neither lora_a nor lora_b")
        if _PEFT_FACTOR.search(name):
            reason = "it is one of PEFT's; name the file adapter_model.safetensors, beside PEFT's configuration"
        raise NotPlainLoraError(f"{path}: tensor {name} is not part of plain LoRA: {reason}")
    _check_kind(found["module"], path)
    return found["module"], found["factor"]


def _check_kind(module: str, path: Path) -> None:
    if kind_of(module) == "embedding":
        raise AmbiguousError(f"{path}: updates the embedding {module}: {_TIED}")
