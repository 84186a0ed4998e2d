"""GGUF files by hand: models from Hugging Face weights, and LoRA files from any metadata and tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from csulora.models.gguf_layout import architecture

HEADS, KV_HEADS = 4, 2  # of factories.llama_weights
Metadata = Mapping[str, str | int | float | bool | list[int]]

_Add = Callable[[str, Any], None]


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, metadata: Metadata) -> None:
    add: dict[type, _Add] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)


Quantise = Callable[[Tensor, GGMLQuantizationType], np.ndarray]


def quantise(matrix: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    return quants.quantize(matrix.float().numpy(), kind)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bfloat16:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def save_model(
    path: Path,
    weights: Mapping[str, Tensor],
    kind: GGMLQuantizationType | None = None,
    name: str = "llama",
    metadata: Metadata | None = None,
    quantise: Quantise = quantise,
    further: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write Hugging Face weights (`factories.llama_weights`, say) as a GGUF model, its matrices quantised to `kind`.

    `further` tensors are written under their own names.
    """
    layout = architecture(name, "test")
    writer = GGUFWriter(path, name)
    counts = {f"{name}.attention.head_count": HEADS, f"{name}.attention.head_count_kv": KV_HEADS}
    add_metadata(writer, {"general.name": "tiny"} | counts | dict(metadata or {}))
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        tensor = layout.tensor_name(module)
        if tensor is None:  # a norm
            continue
        if (order := layout.row_order(module)) is not None:
            weight = weight[order({"heads": HEADS, "kv_heads": KV_HEADS}, len(weight))]
        if kind is None:
            add_tensor(writer, f"{tensor}.weight", weight)
        else:
            writer.add_tensor(f"{tensor}.weight", quantise(weight, kind), raw_dtype=kind)
    for tensor, values in (further or {}).items():
        add_tensor(writer, tensor, values)
    close(writer)
    return path


LORA: Metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}


def save_lora(
    path: Path, tensors: Mapping[str, Tensor | np.ndarray], name: str = "llama", metadata: Metadata | None = None
) -> Path:
    """Write a LoRA file, however wrong."""
    writer = GGUFWriter(path, name)
    add_metadata(writer, LORA if metadata is None else metadata)
    for key, tensor in tensors.items():
        add_tensor(writer, key, torch.as_tensor(tensor))
    close(writer)
    return path
