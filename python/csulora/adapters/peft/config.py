"""PEFT's ``adapter_config.json``: what csulora reproduces exactly, and what it refuses and why.

Every field is on one of three lists; a field on none of them is refused unless it is switched off.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csulora.adapters.peft.patterns import match_all
from csulora.errors import InputError, RefusedError

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
_LARGEST_RANK = 2**31 - 1

_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
)

# Fields that change neither a loaded adapter's update nor where it acts. The layout of Conv1D weights that
# `fan_in_fan_out` tells of is that of the base model; the factors are (out, r) and (r, in) either way.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts from certain tokens on, not on all",
    "arrow_config": "Arrow routes every token among several adapters",
    "bias": "biases of the base model were trained too",
    "ensure_weight_tying": "one update acts on two tied weights",
    "kasa_config": "KaSA also changes the base weights",
    "layer_replication": "the model's layers are replicated",
    "lora_bias": "a bias is added to the low-rank update",
    "megatron_config": "Megatron's parallel layers lay weights out differently",
    "modules_to_save": "whole modules were trained and are replaced",
    "monteclora_config": "MonteCLoRA samples its update",
    "target_parameters": "it targets bare parameters, not modules",
    "trainable_token_indices": "rows of an embedding were trained and are replaced",
    "use_bdlora": "the factors of BD-LoRA are block-diagonal",
    "use_dora": "DoRA also rescales the weight's columns",
    "use_qalora": "QALoRA pools the input of its factors",
    "velora_config": "VeLoRA is not plain LoRA",
}

_HARMLESS_INITIALISATIONS = frozenset({"gaussian", "orthogonal", "mica", "eva", "lora_ga"})
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq")

# How PEFT completes a key of rank_pattern or alpha_pattern, and an entry of layers_pattern.
_PATTERN_KEY = r"(.*\.)?({})$"
_LAYER_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
_WHOLE_NAME = r"(?:{})\Z"


def check_config(config: dict[str, Any], path: Path) -> None:
    """Let through what describes plain LoRA and nothing else.

    Raises:
        RefusedError: the configuration describes something that is not a plain low-rank update.
        InputError: a field is missing or has a value that PEFT does not know.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RefusedError(f"{path}: peft_type is {kind!r}; only LORA adapters can be corrected")
    for field, value in config.items():
        if field in _READ or field in _WITHOUT_EFFECT or _is_off(value):
            continue
        if field not in _REFUSED:
            raise RefusedError(
                f"{path}: csulora does not know the field {field!r}, which may change what the adapter does; "
                "remove it if it has no effect, or use a csulora that knows it"
            )
        raise RefusedError(f"{path}: {field} is set: {_REFUSED[field]}; this cannot be corrected as plain LoRA")
    _check_initialisation(config.get("init_lora_weights"), path)
    for field in ("r", "lora_alpha", "target_modules"):
        if config.get(field) is None:
            raise InputError(f"{path}: {field} is missing; an adapter that PEFT saved has it")
    _check_numbers(config, path)


def ranks_and_scales(config: dict[str, Any], modules: Sequence[str], path: Path) -> dict[str, tuple[int, float]]:
    """Return the rank and the scale PEFT's rules give each module: the first pattern key that matches counts."""
    ranks = _by_pattern(config.get("rank_pattern") or {}, config["r"], modules, path)
    alphas = _by_pattern(config.get("alpha_pattern") or {}, config["lora_alpha"], modules, path)

    def scale(module: str) -> float:
        rank = ranks[module]
        return float(alphas[module] / (math.sqrt(rank) if config.get("use_rslora") else rank))

    return {module: (ranks[module], scale(module)) for module in modules}


def untargeted(config: dict[str, Any], modules: Sequence[str], path: Path) -> list[str]:
    """Return the modules that PEFT would not adapt: not targeted, excluded, or in another layer."""
    excluded = _selected(config.get("exclude_modules") or [], modules, path)
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targeted = set(modules)
    else:
        targeted = _selected(targets, modules, path)
        if not isinstance(targets, str):
            targeted &= set(targets) | _in_transformed_layers(config, modules, path)
    return [module for module in modules if module not in targeted or module in excluded]


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", "none") or value in ([], {})


def _check_initialisation(value: Any, path: Path) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) and value in _HARMLESS_INITIALISATIONS:
        return
    if isinstance(value, str) and value.startswith(_BASE_CHANGING_INITIALISATIONS):
        raise RefusedError(
            f"{path}: init_lora_weights is {value!r}: that initialisation changes the base weights; convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    raise RefusedError(f"{path}: init_lora_weights is {value!r}, which csulora does not know")


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    for rank in _values(config, "r", "rank_pattern", path):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _LARGEST_RANK:
            raise InputError(f"{path}: a rank is {rank!r}; it must be a whole number from 1 to {_LARGEST_RANK}")
    for alpha in _values(config, "lora_alpha", "alpha_pattern", path):
        # Whole numbers may be too large for a float; NaN is not below anything.
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
            raise InputError(f"{path}: an alpha is {alpha!r}; it must be a finite number")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise InputError(f"{path}: use_rslora is {config['use_rslora']!r}; it must be true or false")


def _values(config: dict[str, Any], default: str, pattern: str, path: Path) -> list[Any]:
    by_module = config.get(pattern) or {}
    if not isinstance(by_module, dict):
        raise InputError(f"{path}: {pattern} must map patterns to numbers")
    return [config[default], *by_module.values()]


def _by_pattern(pattern: dict[str, Any], default: Any, modules: Sequence[str], path: Path) -> dict[str, Any]:
    values = dict.fromkeys(modules, default)
    rows = match_all(list(pattern), _PATTERN_KEY, modules, path)
    # From the last to the first, so that the first key that matches has the last word.
    for row, value in reversed(list(zip(rows, pattern.values(), strict=True))):
        values |= {module: value for module, match in zip(modules, row, strict=True) if match is not None}
    return values


def _selected(selector: Any, modules: Sequence[str], path: Path) -> set[str]:
    """Modules that a list of names or name endings selects, or a regular expression over whole names."""
    if isinstance(selector, str):
        (row,) = match_all([selector], _WHOLE_NAME, modules, path)
        return {module for module, match in zip(modules, row, strict=True) if match is not None}
    if not _is_list_of(selector, str):
        raise InputError(f"{path}: target_modules and exclude_modules must be a pattern or a list of names")
    wanted = set(selector)
    return {module for module in modules if not wanted.isdisjoint(_endings(module))}


def _endings(module: str) -> Iterator[str]:
    """Yield a name whole and from behind each of its dots."""
    yield module
    for dot in re.finditer(r"\.", module):
        yield module[dot.end() :]


def _in_transformed_layers(config: dict[str, Any], modules: Sequence[str], path: Path) -> set[str]:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return set(modules)
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not (_is_list_of(layers, int) and _is_list_of(patterns, str)):
        raise InputError(f"{path}: layers_to_transform must hold numbers, and layers_pattern names")
    if patterns:
        rows = match_all(patterns, _LAYER_PATTERN, modules, path)
    else:
        rows = match_all([""], _ANY_LAYER, modules, path)
    found: dict[str, str] = {}
    for row in reversed(rows):
        found |= {module: index for module, index in zip(modules, row, strict=True) if index is not None}
    transformed = set(layers)
    return {module for module, index in found.items() if int(index) in transformed}


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
