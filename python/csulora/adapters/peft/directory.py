"""PEFT adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading lets through plain LoRA and refuses everything else, each with its reason. Writing makes a directory
that every reader of PEFT adapters applies the same way: plain LoRA whose scale is 1 for every module, so that
nothing depends on whether the reader knows rsLoRA, rank_pattern or alpha_pattern.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from csulora.adapters.experts import is_parameter_of_experts, is_targeted
from csulora.adapters.factors import check_matrix, of_one_dtype
from csulora.adapters.lora import Adapter, LoraModule, is_finite
from csulora.adapters.peft import diagnosis, stacked
from csulora.adapters.peft.config import (
    base_model_name,
    column_order,
    ranks_and_scales,
    read_config,
    target_parameters,
    targets,
    untargeted,
)
from csulora.adapters.peft.patterns import Matcher
from csulora.adapters.peft.tensor_names import COPY, PREFIX, module_and_factor
from csulora.adapters.weights_files import (
    CONFIG_FILE,
    LARGEST_CONFIG,
    MOST_UPDATES,
    read_weights,
    tensors_in,
    with_hashes,
)
from csulora.errors import (
    AmbiguousError,
    InputError,
    MissingFileError,
    NotPlainLoraError,
    TooLargeError,
    UnsafeFileError,
)
from csulora.io.files import parse_json, read_regular, to_json
from csulora.io.tensors import save_tensors
from csulora.models.names import WEIGHT, kind_of, may_be_conv1d, parse_expert
from csulora.models.shards import single_name, weight_files

_STEM = "adapter_model"
WEIGHTS_FILE = single_name(_STEM)

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


def read(directory: Path, expert_layout: str | None = None) -> Adapter:
    """Read a PEFT directory. The bytes that are hashed are the bytes that are used.

    Args:
        directory: with the configuration and the weights.
        expert_layout: ``peft`` or ``unsloth``, where nothing in the files says it; see `column_order`.

    Raises:
        InputError: a file is missing or malformed, or the two contradict each other.
        RefusedError: the adapter is more or other than plain LoRA.
    """
    config_file = directory / CONFIG_FILE
    if directory.is_dir() and not config_file.exists():
        raise MissingFileError(f"{directory}: no adapter: {_missing_config(directory)}")
    config_bytes = read_regular(config_file, LARGEST_CONFIG)
    config = read_config(parse_json(config_bytes, config_file), config_file)
    found = weight_files(directory, _STEM)
    if not found.files:
        raise _missing_weights(directory)
    weights = read_weights(found.files, module_and_factor)
    tensors = tensors_in(weights)
    found.check_complete(tensors)
    known = all(file.is_finite for file in weights)
    return with_hashes(_assembled(config, tensors, directory, "", expert_layout, known), config_bytes, weights)


def _missing_weights(directory: Path) -> Exception:
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
    if pickles:
        return UnsafeFileError(f"{directory / pickles[0]}: pickle files can run code; convert it to safetensors")
    return MissingFileError(f"{directory / WEIGHTS_FILE}: no such file; it belongs beside {CONFIG_FILE}")


def _missing_config(directory: Path) -> str:
    """Return what a directory without a configuration seems to be, and what to do."""
    if (directory / "config.json").exists():
        return "it holds a model (config.json); name the directory with the adapter_config.json"
    nested = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if nested:
        return f"it holds directories that are adapters ({', '.join(nested[:3])}); name one of them"
    return f"it holds no {CONFIG_FILE}; name the directory with that file, or a GGUF LoRA file"


def parse(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], path: Path, sha256: str) -> Adapter:
    """Make an adapter of a configuration and tensors named as on disk, under the rules of `read`.

    Args:
        config: what adapter_config.json holds, as JSON types.
        tensors: by PEFT's name on disk, such as ``base_model.model.layers.0.mlp.up_proj.lora_A.weight``.
        path: what messages and reports call the adapter.
        sha256: identity of the content, see `csulora.adapters.weights_files.sha256_of`.
    """
    return _assembled(read_config(config, path / CONFIG_FILE), tensors, path, sha256)


def _assembled(
    config: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    sha256: str,
    expert_layout: str | None = None,
    known_finite: bool = False,
) -> Adapter:
    """Put an adapter together from a configuration that `read_config` let through."""
    weights, settings_file = path / WEIGHTS_FILE, path / CONFIG_FILE
    factors, copies = _group(tensors, weights, known_finite)
    names, matcher = sorted(factors), Matcher(settings_file)
    parameters = _parameters(config, names, weights)
    if stray := untargeted(config, [name for name in names if name not in parameters], matcher):
        raise AmbiguousError(
            f"{weights}: holds factors for {stray[0]}, which adapter_config.json does not target; "
            "servers disagree on whether to apply them"
        )
    if config.get("ensure_weight_tying") and (tied := [name for name in names if kind_of(name) != "linear"]):
        raise NotPlainLoraError(
            f"{settings_file}: ensure_weight_tying is set and {tied[0]} is targeted, so that one update may act "
            "on two tied weights; this cannot be corrected as plain LoRA"
        )
    settings = ranks_and_scales(config, [parameters.get(name, name) for name in names], matcher)
    modules: dict[str, LoraModule] = {}
    for name in names:
        parameter = parameters.get(name, name)
        rank, scale = settings[parameter]
        if parameter.endswith(WEIGHT) or parameter == name:
            found = {name: _module(name, factors[name], rank, scale, weights)}
        else:
            a, b = _pair(name, factors[name], _LINEAR, weights)
            order = column_order(config, expert_layout, settings_file)
            found = dict(stacked.apart(parameter, a, b, rank, scale, order, weights))
        modules |= found
        if len(modules) > MOST_UPDATES:
            raise TooLargeError(f"{weights}: holds more than {MOST_UPDATES} updates, the most that are read")
    return Adapter(modules, config, path, sha256, copies=copies)


def _parameters(config: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, str]:
    """Return the parameters that PEFT adapts by their own names, by the module name in the file."""
    wanted = config.get("target_parameters") or []
    matrices = {name: f"{name}{WEIGHT}" for name in names if is_targeted(f"{name}{WEIGHT}", wanted)}
    for name in filter(may_be_conv1d, matrices):
        raise AmbiguousError(
            f"{path}: target_parameters names {name}{WEIGHT}, which GPT-2 and its kin store as (in, out), so that PEFT "
            "applies the transpose of the update; name the module in target_modules and train again"
        )
    single = next(filter(parse_expert, names), None)
    if single and any(map(is_parameter_of_experts, wanted)):
        raise AmbiguousError(
            f"{path}: holds factors for {single} alone, and target_parameters names parameters of all experts; hosts "
            "disagree on which they apply; save experts in one of the two layouts"
        )
    return matrices | stacked.parameter_names((name for name in names if name not in matrices), config, path)


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's names on disk, scales folded into B (an embedding's: into A)."""
    return dict(_named_tensors(adapter))


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Return the configuration under which `tensors_of` has scale 1 everywhere.

    It is made of the modules' names and ranks. From the adapter's own configuration come the name endings that target
    them, and checked: what the base model and the task are called, and how a base model's Conv1D layers lie.
    """
    known = adapter.config
    stacks, others = stacked.gathered(adapter)
    ranks = {parameter: max(update.rank for update in updates) for parameter, updates in stacks.items()}
    wanted = known.get("target_parameters") or []
    for name, module in others.items():
        matrix = f"{name}{WEIGHT}"
        ranks[matrix if is_targeted(matrix, wanted) else name] = module.rank
    parameters = [name for name in ranks if name not in others]
    names = [name for name in ranks if name in others]
    config = {
        "base_model_name_or_path": base_model_name(known.get("base_model_name_or_path")),
        "bias": "none",
        "fan_in_fan_out": known.get("fan_in_fan_out", False),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": base_model_name(known.get("revision")),
        "target_modules": names if adapter.partial else targets(known, names),
        "task_type": known.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
        **_rank_settings(ranks, adapter.path),
    }
    selected = parameters if adapter.partial else target_parameters(known, parameters)
    return config | ({"target_parameters": selected} if parameters else {})


def write(adapter: Adapter, directory: Path) -> dict[str, torch.Tensor]:
    """Write both files into an existing directory, and return the tensors as they are in the file.

    Raises:
        InputError: folding a scale into B overflows its storage type.
    """
    tensors = tensors_of(adapter)
    if any(module.scale != 1 for module in adapter.modules.values()):
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise InputError(f"{adapter.path}: {name} with its scale does not fit {tensor.dtype}")
    # Of a pattern's keys the first that matches counts, so they stay in their order.
    config = to_json(dict(sorted(config_of(adapter).items())), sort_keys=False)
    (directory / CONFIG_FILE).write_text(config, encoding="utf-8", errors="backslashreplace")
    save_tensors(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    return tensors


def _group(
    tensors: Mapping[str, torch.Tensor], path: Path, known_finite: bool
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Sort the tensors by module and factor, and copies of base matrices by module; none is left over."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    copies: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        module, factor = module_and_factor(name, path)
        check_matrix(
            name,
            tensors[name],
            path,
            higher="convolutions cannot be corrected",
            empty=diagnosis.OF_EMPTY_TENSOR,
            known_finite=known_finite,
        )
        if factor != COPY:
            factors.setdefault(module, {})[factor] = tensors[name]
        elif module in copies:
            raise AmbiguousError(f"{path}: holds {module} of the base model twice; servers disagree on which they load")
        else:
            copies[module] = tensors[name]
    if not factors:
        raise InputError(f"{path}: holds no factor of an update")
    return factors, copies


def _module(name: str, factors: dict[str, torch.Tensor], rank: int, scale: float, path: Path) -> LoraModule:
    is_embedding = any(factor in factors for factor in _EMBEDDING)
    a, b = _pair(name, factors, _EMBEDDING if is_embedding else _LINEAR, path)
    if is_embedding and kind_of(name) != "embedding":
        raise AmbiguousError(
            f"{path}: holds an embedding's factors for {name}, which is no embedding; hosts drop them, or apply the "
            "transpose; save the adapter again with PEFT's save_pretrained"
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"{path}: {name} has factors {list(a.shape)} and {list(b.shape)}, but the configuration says rank {rank}"
        )
    if is_embedding:
        return LoraModule(a.t(), b.t(), scale, is_embedding=True)
    return LoraModule(b, a, scale)


def _pair(
    name: str, factors: dict[str, torch.Tensor], pair: tuple[str, str], path: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both factors, in one type."""
    for factor in pair:
        if factor not in factors:
            raise InputError(f"{path}: {name}.{factor} is missing; an update needs both factors")
    if len(factors) > 2:
        raise InputError(f"{path}: {name} has factors for a linear layer and for an embedding")
    return of_one_dtype(factors[pair[0]], factors[pair[1]], name, path)


def _named_tensors(adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    stacks, others = stacked.gathered(adapter)
    for name, module in others.items():
        folded = module.folded()
        factors = (folded.b.t(), folded.a.t()) if module.is_embedding else (folded.a, folded.b)
        for factor, tensor in zip(_EMBEDDING if module.is_embedding else _LINEAR, factors, strict=True):
            yield f"{PREFIX}{name}.{factor}", tensor.contiguous()
    for parameter, name in stacked.names_in_file(stacks).items():
        for factor, tensor in zip(_LINEAR, stacked.together(stacks[parameter]), strict=True):
            yield f"{PREFIX}{name}.{factor}", tensor


def _rank_settings(ranks: dict[str, int], path: Path) -> dict[str, Any]:
    """Settings that give each module its rank and scale 1, with as few patterns as that takes."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Longest first: a key also matches names that end in it after a dot, and the first match counts.
    ordered = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    unusual = {name: rank for name, rank in ordered.items() if rank != usual}
    wanted = {name: (rank, 1.0) for name, rank in ranks.items()}
    matcher = Matcher(path / CONFIG_FILE)
    for pattern in (unusual, ordered):
        settings = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}
        if ranks_and_scales(settings, list(ranks), matcher) == wanted:
            return settings
    raise InputError(f"{path}: PEFT's rank_pattern cannot tell its module names apart")
