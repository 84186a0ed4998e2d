"""PEFT's ``adapter_config.json``: what csulora reproduces exactly, and what it refuses and why.

Every field of PEFT's ``LoraConfig`` is in one of three tables: it is read, it is described by the type that PEFT gives
it and has no effect, or it must have PEFT's own off value, exactly. Any other field is refused unless it is null or
false, as newer versions of PEFT write what is switched off. What passes is a new dictionary of known fields: no object
of the file's is handed on.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from csulora.adapters.peft import diagnosis
from csulora.adapters.peft.patterns import Matcher
from csulora.errors import AmbiguousError, InputError, NotPlainLoraError

ALL_LINEAR = "all-linear"
# In which order fused experts' columns of B stand: what Unsloth writes since September 2026 -> whose order that is.
COLUMN_ORDERS = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
_LARGEST_RANK = 2**31 - 1
_LONGEST_TEXT = 1000  # characters, of what an adapter says of its base model

Check = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    # Whole numbers may be too large for a float; NaN is not below anything.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_TEXT


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _is_selector(value: Any) -> bool:
    return bool(value) and (isinstance(value, str) or _is_list_of(value, str))


def _maps_to(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_BOOLEAN: Check = _is_a(bool), "true or false"
_SETTINGS: Check = _or_null(_is_a(dict)), "an object or null"
_DESCRIPTION: Check = (
    _or_null(_is_text),
    f"null or printable text of at most {_LONGEST_TEXT} characters",
)
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")

_REQUIRED: dict[str, Check] = {
    "r": (_is_rank, f"a rank, a whole number from 1 to {_LARGEST_RANK}"),
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": (lambda value: value == [] or _is_selector(value), "a pattern or a list of names"),
}

# What decides on the update and where it acts, and what `config_of` hands on.
_READ: dict[str, Check] = _REQUIRED | {
    "use_rslora": _BOOLEAN,
    "ensure_weight_tying": _BOOLEAN,
    "rank_pattern": (_or_null(_maps_to(_is_rank)), "null or an object of ranks, whole numbers from 1"),
    "alpha_pattern": (_or_null(_maps_to(_is_number)), "null or an object of finite numbers"),
    "exclude_modules": (lambda value: value in (None, []) or _is_selector(value), "null, a pattern or a list of names"),
    "layers_to_transform": (
        lambda value: value is None or (value != [] and _is_list_of(_listed(value), int)),
        "null, a number or a list of at least one",
    ),
    "layers_pattern": (lambda value: value is None or _is_list_of(_listed(value), str), "null, a name or a list"),
    "target_parameters": (lambda value: value in (None, []) or _is_list_of(value, str), "null or a list of names"),
    "lora_B_layout": (lambda value: value in (None, *COLUMN_ORDERS), f"null or one of {', '.join(COLUMN_ORDERS)}"),
    "unsloth_fixed": _BOOLEAN,
    "fan_in_fan_out": _BOOLEAN,
    "task_type": (_or_null(lambda value: isinstance(value, str) and value in _TASKS), f"null or one of {_TASKS}"),
    "base_model_name_or_path": _DESCRIPTION,
    "revision": _DESCRIPTION,
}

# What changes neither a trained adapter's update nor where it acts.
_WITHOUT_EFFECT: dict[str, Check] = {
    "auto_mapping": _SETTINGS,
    "corda_config": _SETTINGS,
    "eva_config": _SETTINGS,
    "inference_mode": _BOOLEAN,
    "loftq_config": _SETTINGS,
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "lora_ga_config": _SETTINGS,
    "megatron_core": _DESCRIPTION,
    "peft_version": _DESCRIPTION,
    "qalora_group_size": (_is_a(int), "a whole number"),
    "runtime_config": _SETTINGS,
}

# The one value that PEFT takes for off, and what any other would do. An empty object, text or list is not off.
_OFF: dict[str, tuple[bool | str | None, str]] = {
    "alora_invocation_tokens": (None, "aLoRA acts from certain tokens on, not on all"),
    "arrow_config": (None, "Arrow routes every token among several adapters"),
    "bias": ("none", "biases of the base model were trained too"),
    "kasa_config": (None, "KaSA also changes the base weights"),
    "layer_replication": (None, "the model's layers are replicated"),
    "lora_bias": (False, "a bias is added to the low-rank update"),
    "megatron_config": (None, "Megatron's parallel layers lay weights out differently"),
    "modules_to_save": (None, "whole modules were trained and are replaced"),
    "monteclora_config": (None, "MonteCLoRA samples its update"),
    "trainable_token_indices": (None, "rows of an embedding were trained and are replaced"),
    "use_bdlora": (None, "the factors of BD-LoRA are block-diagonal"),
    "use_dora": (False, "DoRA also rescales the weight's columns"),
    "use_qalora": (False, "QALoRA pools the input of its factors"),
    "velora_config": (None, "VeLoRA is not plain LoRA"),
}

KNOWN_FIELDS = frozenset({"peft_type", "init_lora_weights", *_READ, *_WITHOUT_EFFECT, *_OFF})

_HARMLESS_INITIALISATIONS = frozenset({"gaussian", "orthogonal", "mica", "eva"})
_BASE_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# How PEFT completes a key of rank_pattern or alpha_pattern, and an entry of layers_pattern.
_PATTERN_KEY = r"(.*\.)?({})$"
_LAYER_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
_WHOLE_NAME = r"(?:{})\Z"


def read_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Let through what describes plain LoRA and nothing else.

    Args:
        config: what ``path`` holds, as JSON types.
        path: what messages call it.

    Returns:
        The fields that say which update the adapter is and for which model, checked; no other field.

    Raises:
        RefusedError: the configuration describes something that is not a plain low-rank update.
        InputError: a field is missing or has a value that PEFT does not know.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        known = diagnosis.of_config(config) if kind is None else None
        raise NotPlainLoraError(f"{path}: {known or f'peft_type is {kind!r}; only LORA adapters can be corrected'}")
    fields = dict.fromkeys(_REQUIRED) | config
    for field in sorted(fields, key=lambda field: field not in _OFF):  # what it is before what it lacks
        _check_field(field, fields[field], path)
    _check_initialisation(config.get("init_lora_weights"), path)
    found = {field: config[field] for field in _READ if config.get(field) is not None}
    # Unsloth writes both among what describes the model.
    described = config.get("auto_mapping") or {}
    for field in ("lora_B_layout", "unsloth_fixed"):
        if field in described:
            _check_field(field, described[field], path)
            if found.setdefault(field, described[field]) != described[field]:
                raise InputError(f"{path}: {field} is there twice, as {found[field]!r} and {described[field]!r}")
    return found


def column_order(config: dict[str, Any], told: str | None, path: Path) -> str:
    """Return in whose order the columns of B of fused experts stand: ``peft`` or ``unsloth``.

    Args:
        config: what `read_config` returned.
        told: what somebody who knows says; None: nothing.
        path: the configuration, for messages.

    Raises:
        RefusedError: Unsloth wrote the file, whose order was another one until September 2026, and nothing says which.
        InputError: ``told`` is neither, or the file says otherwise.
    """
    if told is not None and told not in COLUMN_ORDERS.values():
        raise InputError(f"the layout of experts is {told!r}; it must be {' or '.join(COLUMN_ORDERS.values())}")
    stated = COLUMN_ORDERS.get(config.get("lora_B_layout") or "")
    if stated and told and told != stated:
        raise InputError(f"{path}: lora_B_layout says that experts are laid out as {stated} does; leave out {told}")
    if order := stated or told:
        return order
    if config.get("unsloth_fixed"):
        raise AmbiguousError(
            f"{path}: Unsloth trained these fused experts, and until September 2026 it ordered them unlike PEFT; "
            "nothing in the file says which order this is. Say so: csulora correct ... --expert-layout unsloth if it "
            "was trained before, --expert-layout peft if after"
        )
    return "peft"


def base_model_name(value: Any) -> str | None:
    """Return what an adapter calls its base model, if that can stand in a document."""
    return value if value and _is_text(value) else None


def ranks_and_scales(config: dict[str, Any], modules: Sequence[str], matcher: Matcher) -> dict[str, tuple[int, float]]:
    """Return the rank and the scale PEFT's rules give each module: the first pattern key that matches counts."""
    ranks = _by_pattern(config.get("rank_pattern") or {}, config["r"], modules, matcher)
    alphas = _by_pattern(config.get("alpha_pattern") or {}, config["lora_alpha"], modules, matcher)

    def scale(module: str) -> float:
        rank = ranks[module]
        return float(alphas[module] / (math.sqrt(rank) if config.get("use_rslora") else rank))

    return {module: (ranks[module], scale(module)) for module in modules}


def untargeted(config: dict[str, Any], modules: Sequence[str], matcher: Matcher) -> list[str]:
    """Return the modules that PEFT would not adapt: not targeted, excluded, or in another layer."""
    excluded = _selected(config.get("exclude_modules") or [], modules, matcher)
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targeted = set(modules)
    else:
        targeted = _selected(targets, modules, matcher)
        if not isinstance(targets, str):
            targeted &= set(targets) | _in_transformed_layers(config, modules, matcher)
    return [module for module in modules if module not in targeted or module in excluded]


def targets(config: dict[str, Any], modules: Sequence[str]) -> list[str]:
    """Return ``target_modules`` that select all of these modules, with nothing else to select or exclude them.

    Name endings where the configuration lists such and selects by nothing else, as most readers expect; names in full
    otherwise.
    """
    listed = config.get("target_modules")
    selectors = ("exclude_modules", "layers_to_transform")
    if isinstance(listed, list) and all(config.get(selector) in (None, []) for selector in selectors):
        endings = {ending for module in modules for ending in _endings(module)}
        return sorted(endings.intersection(listed))
    return list(modules)


def target_parameters(config: dict[str, Any], parameters: Sequence[str]) -> list[str]:
    """Return ``target_parameters`` that select all of these: the configuration's own endings where those do.

    PEFT holds several such adapters in one model only if this list is the same in all of them.
    """
    listed = set(config.get("target_parameters") or [])
    selecting = [listed.intersection(_endings(parameter)) for parameter in parameters]
    return sorted(set().union(*selecting)) if all(selecting) else list(parameters)


def _check_field(field: str, value: Any, path: Path) -> None:
    if field in _OFF:
        off, reason = _OFF[field]
        if type(value) is not type(off) or value != off:
            raise NotPlainLoraError(
                f"{path}: {field} is set to {value!r}, where only {json.dumps(off)} is off: {reason}; this cannot be "
                "corrected as plain LoRA"
            )
    elif field not in KNOWN_FIELDS:
        if value is not None and value is not False:
            raise NotPlainLoraError(
                f"{path}: csulora does not know the field {field!r}, which may change what the adapter does; "
                "remove it if it has no effect, or use a csulora that knows it"
            )
    elif value is None and field in _REQUIRED:
        raise InputError(f"{path}: {field} is missing; an adapter that PEFT saved has it")
    elif check := _READ.get(field) or _WITHOUT_EFFECT.get(field):
        fits, wanted = check
        if not fits(value):
            raise InputError(f"{path}: {field} is {value!r}; it must be {wanted}")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _check_initialisation(value: Any, path: Path) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) and value in _HARMLESS_INITIALISATIONS:
        return
    if isinstance(value, str) and value.startswith(_BASE_CHANGING_INITIALISATIONS):
        raise NotPlainLoraError(
            f"{path}: init_lora_weights is {value!r}: that initialisation changes the base weights; convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    raise NotPlainLoraError(f"{path}: init_lora_weights is {value!r}, which csulora does not know")


def _by_pattern(pattern: dict[str, Any], default: Any, modules: Sequence[str], matcher: Matcher) -> dict[str, Any]:
    values = dict.fromkeys(modules, default)
    rows = matcher.match_all(list(pattern), _PATTERN_KEY, modules)
    # From the last to the first, so that the first key that matches has the last word.
    for row, value in reversed(list(zip(rows, pattern.values(), strict=True))):
        values |= {module: value for module, match in zip(modules, row, strict=True) if match is not None}
    return values


def _selected(selector: str | list[str], modules: Sequence[str], matcher: Matcher) -> set[str]:
    """Modules that a list of names or name endings selects, or a regular expression over whole names."""
    if isinstance(selector, str):
        (row,) = matcher.match_all([selector], _WHOLE_NAME, modules)
        return {module for module, match in zip(modules, row, strict=True) if match is not None}
    wanted = set(selector)
    return {module for module in modules if not wanted.isdisjoint(_endings(module))}


@lru_cache(maxsize=4096)  # a server's adapters have the same names
def _endings(module: str) -> tuple[str, ...]:
    """Return a name whole and from behind each of its dots."""
    endings = [module]
    while "." in module:
        module = module.partition(".")[2]
        endings.append(module)
    return tuple(endings)


def _in_transformed_layers(config: dict[str, Any], modules: Sequence[str], matcher: Matcher) -> set[str]:
    layers = config.get("layers_to_transform")
    if layers is None:
        return set(modules)
    patterns = _listed(config.get("layers_pattern") or [])
    if patterns:
        rows = matcher.match_all(patterns, _LAYER_PATTERN, modules)
    else:
        rows = matcher.match_all([""], _ANY_LAYER, modules)
    found: dict[str, str] = {}
    for row in reversed(rows):
        found |= {module: index for module, index in zip(modules, row, strict=True) if index is not None}
    transformed = set(_listed(layers))
    return {module for module, index in found.items() if int(index) in transformed}
