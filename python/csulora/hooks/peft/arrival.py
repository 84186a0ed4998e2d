"""Whether what was to be loaded arrived in the model: PEFT drops factors whose names it does not find, and goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from csulora.adapters.lora import Adapter
from csulora.adapters.peft.directory import tensors_of
from csulora.adapters.peft.tensor_names import PREFIX
from csulora.errors import HostLimitError
from csulora.models.names import bare

_FACTOR = re.compile(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$")


def check_arrived(model: Any, adapter_name: str, corrected: Adapter, undo: Callable[[], Any]) -> None:
    """Compare an adapter in a model with the one that was to be loaded; where they differ, call ``undo`` and raise.

    Raises:
        RefusedError: a factor is missing, has other values, or would be applied at another scale.
    """
    is_offloaded = bool({"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()))
    arrived = {bare(name): factor for name, factor in _factors(model, adapter_name)}
    missing = {
        _FACTOR.sub("", name.removeprefix(PREFIX))
        for name, factor in tensors_of(corrected).items()
        if not _is_same(arrived.get(bare(name)), factor, is_offloaded)
    }
    if missing:
        undo()
        raise HostLimitError(
            f"{corrected.path}: {len(missing)} of {len(corrected.modules)} modules did not arrive in the model, such "
            f"as {min(missing)}; the adapter is for another class of model, or PEFT cannot load it "
            "(csulora inspect says which)"
        )


def _factors(model: Any, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the factors that are applied at scale 1, by their names on disk."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or layer.scaling.get(adapter_name) != 1:
            continue
        for factor in ("lora_A", "lora_B"):
            if adapter_name in getattr(layer, factor):
                yield f"{name}.{factor}.weight", getattr(layer, factor)[adapter_name].weight
        for factor in ("lora_embedding_A", "lora_embedding_B"):
            if adapter_name in getattr(layer, factor):
                yield f"{name}.{factor}", getattr(layer, factor)[adapter_name]


def _is_same(arrived: torch.Tensor | None, factor: torch.Tensor, is_offloaded: bool) -> bool:
    if arrived is None or arrived.shape != factor.shape:
        return False
    if arrived.is_meta:  # accelerate keeps the values
        return is_offloaded
    return torch.equal(arrived, factor.to(arrived))
