"""What a checkpoint says of its quantisation: the blocks that share a scale, or that csulora does not read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.models.scaled_codes import Block

# Methods that store weights as FP8 or MXFP4, in their names in config.json. All others are refused.
_READ = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")
_READ_FORMATS = ("float-quantized", "naive-quantized", "dense")  # of compressed-tensors
_READ_ALGORITHM = "FP8"  # of modelopt
_DEFAULT_FP8_BLOCK = (128, 128)  # of `transformers`, for method fp8

_NAMES = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ"}
# Tensors that only such a checkpoint has, the rarest first: GPTQ and AWQ share two of the three names.
_MARKS = {
    ".SCB": "bitsandbytes (8-bit)",
    ".weight.absmax": "bitsandbytes (4-bit)",
    ".weight.quant_map": "bitsandbytes (4-bit)",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
    ".g_idx": "GPTQ",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors (packed)",
    ".bitmask": "compressed-tensors (sparse)",
}


def settings_of(config: Mapping[str, Any], config_file: Path) -> dict[str, Any]:
    """Return ``quantization_config`` of the model, or of the language model within it; raises `InputError`."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        settings = part.get("quantization_config") or {}
        if not isinstance(settings, dict):
            raise InputError(f"{config_file}: quantization_config is {settings!r}; it must be an object")
        if settings:
            return settings
    return {}


def check_readable(settings: Mapping[str, Any], tensors: Iterable[str], directory: Path) -> None:
    """Raise `InputError` if the weights are quantised in a way that csulora does not read."""
    name = _unread_method(settings) or _unread_tensors(tensors)
    if name:
        raise InputError(
            f"{directory}: is quantised with {name}, which csulora does not read; name the unquantised repository "
            "that it was made from, whose subspace file also serves adapters for the quantised copy"
        )


def blocks_of(settings: Mapping[str, Any], shape: tuple[int, int], config_file: Path) -> list[Block]:
    """Return the blocks that may share a scale in an FP8 matrix, as (rows, columns).

    A scale for the whole matrix or for each row is a block too.
    """
    whole_and_rows = [shape, (1, shape[1])]
    if settings.get("quant_method") == "fp8":
        block = settings.get("weight_block_size", _DEFAULT_FP8_BLOCK)
        declared = [] if block is None else [_block(block, "weight_block_size", config_file)]
        return declared if settings.get("weight_block_size") else [*declared, *whole_and_rows]
    return [*whole_and_rows, *_blocks_of_groups(settings, config_file)]


def _blocks_of_groups(settings: Mapping[str, Any], config_file: Path) -> list[Block]:
    """Return the blocks that compressed-tensors declares."""
    groups = settings.get("config_groups")
    blocks = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        if weights.get("strategy") == "group":
            blocks.append(_block([1, weights.get("group_size")], "group_size", config_file))
        if weights.get("strategy") == "block":
            blocks.append(_block(weights.get("block_structure"), "block_structure", config_file))
    return blocks


def _block(value: object, field: str, config_file: Path) -> Block:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise InputError(f"{config_file}: {field} is {value!r}; it must be a list of two positive numbers")


def _unread_method(settings: Mapping[str, Any]) -> str | None:
    if not settings:
        return None
    method = str(settings.get("quant_method"))
    if method not in _READ:
        bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None)
        return _NAMES.get(method, method) + (f" ({bits}-bit)" if bits else "")
    if method == "compressed-tensors" and (form := settings.get("format")) not in (None, *_READ_FORMATS):
        return f"compressed-tensors ({form})"
    if method == "modelopt" and (algorithm := settings.get("quant_algo")) != _READ_ALGORITHM:
        return f"modelopt ({algorithm})"
    return None


def _unread_tensors(tensors: Iterable[str]) -> str | None:
    names = list(tensors)
    return next((name for mark, name in _MARKS.items() if any(tensor.endswith(mark) for tensor in names)), None)
