"""Adapters that PEFT and transformers add up under a guard: their sum obeys the limit that each of them does.

What is measured is what the model holds, so corrected adapters, also those that were swapped in. It is measured before
they are activated or merged. A weighted adapter is measured once PEFT has made it, since some of its ways of combining
are no sums; one that undoes too much is deleted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft import functional
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers.integrations.peft import PeftAdapterMixin

from csulora.errors import RefusedError, UncoveredRouteError
from csulora.hooks.peft.loading import by_name, of_model
from csulora.hooks.signature import check_signature
from csulora.serving.gate import Gate

_Function = Callable[..., Any]

# What stands before a name in the state of the object that is asked, on disk.
_OF_TUNER, _OF_TRANSFORMERS = "base_model.", "base_model.model."


def check_together_host() -> None:
    """Raise `HostError` unless the functions that activate and merge adapters look as expected."""
    for tuner in (BaseTuner, MixedModel):
        check_signature(tuner.set_adapter, "self", "adapter_name")
        check_signature(tuner._unload_and_optionally_merge, "self", "merge", "progressbar", "safe_merge")
    check_signature(functional.set_adapter, "model", "adapter_name")
    check_signature(BaseTuner.merge_adapter, "self", "adapter_names")
    check_signature(LoraModel.add_weighted_adapter, "self", "adapters", "weights", "adapter_name")
    check_signature(PeftAdapterMixin.set_adapter, "self", "adapter_name")


def together_replacements(gate: Gate) -> Iterator[tuple[Any, str, Any]]:
    """Everything to put in the hosts' place: owner, attribute, replacement. Without a limit there is nothing to do."""
    if gate.policy.max_undo is None:
        return
    for tuner in (BaseTuner, MixedModel):
        yield tuner, "set_adapter", _activating(gate, _OF_TUNER, tuner.set_adapter)
        merge = tuner._unload_and_optionally_merge
        yield tuner, "_unload_and_optionally_merge", _merging(gate, merge)
    yield BaseTuner, "merge_adapter", _merging(gate, BaseTuner.merge_adapter)
    yield LoraModel, "add_weighted_adapter", _weighing(gate, LoraModel.add_weighted_adapter)
    yield PeftAdapterMixin, "set_adapter", _activating(gate, _OF_TRANSFORMERS, PeftAdapterMixin.set_adapter)
    yield functional, "set_adapter", _refusing_several(functional.set_adapter)


def _check_sum(gate: Gate, model: Any, names: Sequence[str], prefix: str) -> None:
    served = {name: of_model(model, name, prefix) for name in dict.fromkeys(names)}
    gate.check_sum(served, [1.0] * len(served))


def _activating(gate: Gate, prefix: str, original: _Function) -> _Function:
    @functools.wraps(original)
    def set_adapter(self: Any, adapter_name: str | list[str], *args: Any, **options: Any) -> Any:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            _check_sum(gate, self, adapter_name, prefix)
        return original(self, adapter_name, *args, **options)

    return set_adapter


def _refusing_several(original: _Function) -> _Function:
    @functools.wraps(original)
    def set_adapter(model: Any, adapter_name: str | list[str], *args: Any, **options: Any) -> Any:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise UncoveredRouteError(
                f"{' + '.join(adapter_name)}: under a guard with max_undo several adapters are activated by a "
                "PeftModel's or a transformers model's own set_adapter, which measures their sum"
            )
        return original(model, adapter_name, *args, **options)

    return set_adapter


def _merging(gate: Gate, original: _Function) -> _Function:
    @functools.wraps(original)
    def merge(*args: Any, **options: Any) -> Any:
        given = by_name(original, *args, **options)
        tuner = given["self"]
        if given.get("merge", True):
            layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
            merged = [name for layer in layers for name in layer.merged_adapters]
            names = set(merged).union(given.get("adapter_names") or tuner.active_adapters)
            if len(names) > 1:
                _check_sum(gate, tuner, sorted(names), _OF_TUNER)
        return original(*args, **options)

    return merge


def _weighing(gate: Gate, original: _Function) -> _Function:
    @functools.wraps(original)
    def add_weighted_adapter(*args: Any, **options: Any) -> Any:
        given = by_name(original, *args, **options)
        tuner, name = given["self"], given["adapter_name"]
        is_there = name in tuner.peft_config  # then PEFT does nothing
        result = original(*args, **options)
        try:
            if not is_there:
                _check_sum(gate, tuner, [name], _OF_TUNER)
        except RefusedError:
            tuner.delete_adapter(name)
            raise
        return result

    return add_weighted_adapter
