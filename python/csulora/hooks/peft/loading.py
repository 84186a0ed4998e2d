"""One load by PEFT or transformers: where the adapter lies, and how the host is given the corrected one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from csulora.adapters.expert_encoding import FUSED, has_experts
from csulora.adapters.experts import is_fused, is_parameter_of_experts
from csulora.adapters.lora import Adapter
from csulora.adapters.peft.directory import WEIGHTS_FILE, parse
from csulora.adapters.weights_files import CONFIG_FILE, sha256_of
from csulora.correction.report import Report
from csulora.errors import InputError, UncoveredRouteError
from csulora.io.hub import download
from csulora.serving.open_decision import OpenDecision

HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")

# With these the host would give a corrected update another scale, or add it to another module.
_OVERRIDES = ("config", "key_mapping", "weight_mapping")

_INITIALISED_FASTER = 1 << 15  # entries of a module's factors up to which PEFT makes random ones in no time

# Set while the host loads what was corrected: everything the guard replaced then behaves as the original.
loads_corrected: ContextVar[bool] = ContextVar("corrected", default=False)


def corrected_for(model: Any, decision: OpenDecision, adapter: Adapter) -> tuple[Adapter, Report]:
    """Return the corrected adapter and the report; factors of single experts as the model keeps its experts.

    PEFT would put them together, too, but drops those of some families, and forgets patterns.
    """
    is_stacked = any(p.dim() == 3 and is_parameter_of_experts(name) for name, p in model.named_parameters())
    is_apart = has_experts(adapter) and not is_fused(adapter)
    return decision.correct(adapter, FUSED if is_stacked and is_apart else None)


@contextmanager
def host_loads(decision: OpenDecision, corrected: Adapter) -> Iterator[Path]:
    """Yield the corrected adapter's directory, and let the host load it."""
    with decision.private_directory(corrected) as directory:
        token = loads_corrected.set(True)
        try:
            yield directory
        finally:
            loads_corrected.reset(token)


@contextmanager
def without_initialising(
    corrected: Adapter, model: Any, adapter_name: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Spare PEFT the random values that an adapter replaces at once, where making them takes longer."""
    if {"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()):
        yield options  # PEFT itself keeps parts of such a model on the meta device
        return
    entries = sum(module.b.numel() + module.a.numel() for module in corrected.modules.values())
    if entries >= _INITIALISED_FASTER * len(corrected.modules) and not options.get("is_trainable"):
        options = {"low_cpu_mem_usage": True} | options
    try:
        yield options
    finally:
        _zero_what_is_missing(model, adapter_name)


def _zero_what_is_missing(model: Any, adapter_name: str) -> None:
    """Zero the factors that PEFT left on the meta device, as where a configuration targets more than the file holds.

    torch would compute with whatever memory it finds in their place.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            missing = {
                name: torch.zeros(factor.shape, dtype=factor.dtype)
                for name, factor in factors.named_parameters()
                if factor.is_meta and name.split(".")[0] == adapter_name
            }
            if missing:
                factors.load_state_dict(missing, strict=False, assign=True)
                layer._move_adapter_to_device_of_base_layer(adapter_name)


def by_name(function: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """Return all arguments of a call by name, also those that the function itself collects."""
    given = dict(inspect.signature(function).bind(*args, **options).arguments)
    collected = given.pop("kwargs", {})
    return {**given, **collected}


def local_directory(source: Any, options: dict[str, Any]) -> Path:
    """Return the local directory of an adapter, and take what locates it out of ``options``."""
    hub = {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
    subfolder = hub.pop("subfolder", None) or ""
    directory = Path(source)
    if not directory.exists():
        directory = download(str(source), [str(Path(subfolder, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)], **hub)
    return directory / subfolder


def taken_from_hub(given: dict[str, Any]) -> dict[str, Any]:
    """Take what locates an adapter out of the arguments of transformers' ``load_adapter``; the last word counts."""
    config = given.get("load_config")
    hub = dict(getattr(config, "download_kwargs", None) or {})
    if config is not None:
        given["load_config"] = replace(config, download_kwargs={})
    for name in ("download_kwargs", "adapter_kwargs"):
        hub |= given.pop(name, None) or {}
    return hub | {name: given.pop(name) for name in HUB_ARGUMENTS if name in given}


def check_nothing_overrides(options: Mapping[str, Any], source: Any) -> None:
    """Refuse arguments of a call under which the host would not load what was corrected."""
    for name in _OVERRIDES:
        if options.get(name):
            raise UncoveredRouteError(
                f"{source}: a corrected adapter is loaded with its own config, into the modules that its file names; "
                f"pass no {name}"
            )


def check_name_is_free(adapters: Mapping[str, Any], name: str) -> None:
    """Let no adapter be loaded over another: PEFT would keep the configuration, and with it the scale, of the old."""
    if name in adapters:
        raise InputError(f"the model has an adapter {name!r} already; delete it first or choose another name")


def of_model(model: Any, adapter_name: str, prefix: str = "") -> Adapter:
    """Return an adapter that a model holds as it would be read from disk.

    Args:
        model: a ``PeftModel``, its tuner, or a transformers model.
        adapter_name: its name there.
        prefix: what stands before the names of the model's state on disk.
    """
    settings = json.dumps(model.peft_config[adapter_name].to_dict(), sort_keys=True, default=sorted).encode()
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {f"{prefix}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    sha256 = sha256_of(settings, safetensors.torch.save(tensors))
    return parse(json.loads(settings), tensors, Path(adapter_name), sha256)
