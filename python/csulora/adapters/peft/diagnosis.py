"""What went wrong when an adapter was saved: one sentence what its names or shapes are, one what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ADAPTER_NAME = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\.(?P<name>[^.]+)(?:\.weight)?$")

# Part of a tensor's name -> what left it there, and what to do.
_WRAPPERS = {
    "_orig_mod.": "it was saved from a model that torch.compile had wrapped; save the model itself: model._orig_mod",
    "_fsdp_wrapped_module.": "it was saved from a model that FSDP had wrapped; gather and unwrap the model first "
    "(accelerate: accelerator.unwrap_model and accelerator.get_state_dict)",
    "_checkpoint_wrapped_module.": "it was saved under a wrapper for activation checkpointing; save the model itself",
}

OF_EMPTY_TENSOR = (
    ", as DeepSpeed's ZeRO-3 leaves parameters that it has spread; gather them on saving "
    "(stage3_gather_16bit_weights_on_model_save), or convert the checkpoint with zero_to_fp32.py"
)


def of_name(name: str, prefix: str) -> str | None:
    """Return what is wrong with a tensor's name that is LoRA's up to a known mistake; None if none is known.

    >>> of_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "base_model.model.")
    "it has the adapter's name, 'default', in it, as in memory; save with PeftModel.save_pretrained, or take it out"
    """
    for fragment, reason in _WRAPPERS.items():
        if fragment in name:
            return reason
    if name.startswith("module."):
        return "it was saved from a model that data parallelism had wrapped; save the model itself: model.module"
    found = _ADAPTER_NAME.search(name)
    if found and found["name"] not in ("weight", "bias"):
        return (
            f"it has the adapter's name, {found['name']!r}, in it, as in memory; save with PeftModel.save_pretrained, "
            "or take it out"
        )
    if found and not name.startswith(prefix):
        return (
            f"its name does not start with {prefix} once; save with PeftModel.save_pretrained, or put that before all "
            "names"
        )
    return None


def of_config(config: Mapping[str, Any]) -> str | None:
    """Return what a configuration without ``peft_type`` is; None if that is not known."""
    if "lora_parameters" in config or "fine_tune_type" in config:
        return (
            "it is an adapter of mlx-lm, whose weights are not there; name a directory with adapters.safetensors, to "
            "which a checkpoint such as 0000100_adapters.safetensors may be renamed"
        )
    if "model_type" in config:
        return "it is the configuration of a model; name an adapter's directory"
    return None
