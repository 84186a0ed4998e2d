"""PEFT's ``hotswap_adapter`` under a guard: weights and the configuration that is checked are of one corrected adapter.

PEFT reads weights first and applies a configuration later, in functions of its own. Between them nothing is kept but
which tensors were corrected, for as long as those live.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import ParamWrapper
from peft.utils import hotswap as peft_hotswap
from torch.utils.weak import WeakTensorKeyDictionary

from csulora.adapters.peft import stacked
from csulora.errors import HostLimitError, UncoveredRouteError
from csulora.hooks.peft.loading import check_nothing_overrides, host_loads, loads_corrected, local_directory
from csulora.hooks.signature import check_signature
from csulora.models.names import parse_expert
from csulora.serving.gate import Gate

_OF_EXPERTS = re.compile(r"\.experts\.(\d+\.\w+\.|(base_layer\.)*)lora_[AB]\.")

_Configs = MutableMapping[torch.Tensor, peft.LoraConfig]


def check_hotswap() -> None:
    """Raise `HostError` unless PEFT's functions look as expected."""
    check_signature(vars(peft_hotswap)["load_peft_weights"], "model_id", "device", "key_mapping")
    check_signature(peft_hotswap.check_hotswap_configs_compatible, "config0", "config1")
    check_signature(peft_hotswap.hotswap_adapter_from_state_dict, "model", "state_dict", "adapter_name", "config")


def hotswap_replacements(gate: Gate) -> Iterator[tuple[Any, str, Any]]:
    """Everything to put in PEFT's place: owner, attribute, replacement."""
    configs: _Configs = WeakTensorKeyDictionary()  # what belongs to each tensor that this guard corrected
    for name, replacement in (
        ("load_peft_weights", functools.partial(_weights, gate, configs)),
        ("check_hotswap_configs_compatible", _check),
        ("hotswap_adapter_from_state_dict", functools.partial(_swap, configs)),
    ):
        yield peft_hotswap, name, replacement(getattr(peft_hotswap, name))


def _weights(gate: Gate, configs: _Configs, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_peft_weights(model_id: Any, device: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
        if loads_corrected.get():
            weights: dict[str, torch.Tensor] = original(model_id, device, **options)
            return weights
        check_nothing_overrides(options, model_id)
        location = local_directory(model_id, options)
        with gate.decision(location) as decision:
            corrected, _ = decision.correct(decision.read_directory(location))
            with host_loads(decision, corrected) as directory:
                config = peft.LoraConfig.from_pretrained(str(directory))
                weights = original(directory, device)
            configs.update(dict.fromkeys(weights.values(), config))
            return weights

    return load_peft_weights


def _check(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
        # The guard has not seen ``config1``; `_swap` checks the one that counts.
        if loads_corrected.get():
            original(config0, config1)

    return check_hotswap_configs_compatible


def _swap(configs: _Configs, original: Callable[..., Any]) -> Callable[..., Any]:
    check = peft_hotswap.check_hotswap_configs_compatible

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **options: Any
    ) -> None:
        if not loads_corrected.get():
            found = [configs.get(tensor) for tensor in state_dict.values()]
            config = found[0] if found else None
            if config is None or any(other is not config for other in found):
                raise UncoveredRouteError("under a guard an adapter is swapped in from a directory, not from memory")
            _check_experts(model, state_dict, adapter_name, config)
            check(model.peft_config[adapter_name], config)
        original(model, state_dict, adapter_name, config, *args, **options)

    return hotswap_adapter_from_state_dict


def _check_experts(
    model: Any, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: peft.LoraConfig
) -> None:
    """Raise `RefusedError` for factors of experts that PEFT would put elsewhere or, at another rank, scramble."""
    factors = {key: tensor for key, tensor in state_dict.items() if _OF_EXPERTS.search(key)}
    places = {key: key.removesuffix(f".{adapter_name}.weight").rpartition(".") for key in factors}
    fused = {module for module, _, _ in places.values() if not parse_expert(module)}
    parameters = stacked.parameter_names(fused, {"target_parameters": config.target_parameters}, Path(adapter_name))
    layers = dict(model.named_modules())
    for key, (module, _, factor) in places.items():
        layer, parameter = layers.get(module), parameters.get(module, "").rpartition(".")[2]
        is_its_own = isinstance(layer, ParamWrapper) and layer.parameter_name == parameter
        if not is_its_own or getattr(layer, factor)[adapter_name].weight.shape != factors[key].shape:
            raise HostLimitError(
                f"PEFT scrambles factors of experts that it swaps in for others than those of the same parameter and "
                f"rank: {key} is {list(factors[key].shape)}, for {parameter or 'one expert'}; load the adapter under a "
                "name of its own (load_adapter)"
            )
