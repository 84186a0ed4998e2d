"""Adapters from and to disk, whatever their format."""

from __future__ import annotations

import json
from pathlib import Path

from csulora.adapters.gguf import file as gguf
from csulora.adapters.lora import CORRECTED_SHA256, REPORT_FILE, Adapter
from csulora.adapters.peft import directory as peft
from csulora.errors import InputError, RefusedError, check_type
from csulora.io.files import atomic_directory, check_not_input, sha256_of_file, to_json
from csulora.models.gguf_base import BaseModel


def load_adapter(path: str | Path, base_model: str | Path | None = None) -> Adapter:
    """Read an adapter and check every field and tensor of it.

    Args:
        path: a PEFT directory (``adapter_config.json`` and ``adapter_model.safetensors``) or a GGUF LoRA file.
        base_model: the model that a GGUF file is for, a GGUF file or a Hugging Face model directory. Some
            architectures need it, because their rows are reordered by heads that the file does not count.

    Raises:
        InputError: the adapter is missing or malformed, or does not fit ``base_model``.
        RefusedError: it is something that cannot be corrected as plain LoRA.

    >>> lora = csulora.load_adapter(adapter)
    >>> lora.modules["model.layers.0.self_attn.q_proj"].rank
    8
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such adapter")
    if path.is_dir():
        return peft.read(path)
    return gguf.read(path, BaseModel.open(base_model) if base_model is not None else None)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    format: str = "peft",
    *,
    base_model: str | Path | None = None,
    outtype: str | None = None,
) -> str:
    """Write an adapter, complete or not at all.

    Args:
        adapter: what `load_adapter` or `correct` returned.
        path: for ``peft``, a directory to create, with report and card if the adapter was corrected; one that
            csulora wrote before is replaced. For ``gguf``, a file to write.
        format: ``peft`` or ``gguf``.
        base_model: for ``gguf``, the model that llama.cpp will run it with.
        outtype: for ``gguf``, the type of the tensors: ``f32``, ``f16`` or ``bf16``; None keeps the adapter's.

    Returns:
        The sha256 of what was written, as `load_adapter` finds it: of a PEFT directory's configuration and weights
        (its report states it too), or of a GGUF file.

    Raises:
        InputError: ``path`` cannot be created or is an input, or the adapter does not fit the format or the model.
        RefusedError: llama.cpp has no place for one of its modules, or it holds copies of base matrices.

    >>> sha256 = csulora.save_adapter(csulora.load_adapter(adapter), "copy")
    >>> csulora.load_adapter("copy").sha256 == sha256
    True
    """
    check_type(adapter, Adapter, "adapter")
    path = Path(path)
    if adapter.copies:
        raise RefusedError(
            f"{adapter.path}: holds a copy of the base model's {min(adapter.copies)}, which only a correction compares "
            "with the model; correct the adapter (policy none changes nothing), or save it without: "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    check_not_input(path, [adapter.path, *([base_model] if base_model else [])])
    if format == "gguf":
        if base_model is None:
            raise InputError(f"{path}: a GGUF file is written for a model; name it (base_model, --base-model)")
        gguf.write(adapter, path, BaseModel.open(base_model), outtype)
        return sha256_of_file(path)
    if format == "peft":
        return _save_peft(adapter, path)
    raise InputError(f"unknown adapter format {format!r}; it must be peft or gguf")


def _save_peft(adapter: Adapter, path: Path) -> str:
    with atomic_directory(path, marker=REPORT_FILE) as directory:
        sha256 = peft.sha256_as_written(directory, peft.write(adapter, directory))
        for name, text in adapter.documents.items():
            if name == REPORT_FILE:
                text = to_json(json.loads(text) | {CORRECTED_SHA256: sha256})
            (directory / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return sha256
