"""Adapters from and to disk, whatever their format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from csulora.adapters.factors import DTYPES, check_in_memory, of_one_dtype
from csulora.adapters.gguf import file as gguf
from csulora.adapters.lora import (
    CORRECTED_SHA256,
    REPORT_FILE,
    SIGNATURE_FILE,
    STATEMENT_FILE,
    Adapter,
    Format,
    LoraModule,
    is_finite,
)
from csulora.adapters.mlx import directory as mlx
from csulora.adapters.peft import directory as peft
from csulora.adapters.weights_files import CONFIG_FILE, hashes_as_written, joined
from csulora.errors import BaseCopyError, InputError, NotFiniteError, check_type
from csulora.io.files import atomic_directory, check_not_inputs, is_gguf_name, sha256_of_file, to_json
from csulora.io.hub import local_path
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_parts import parts_beside

FORMATS = get_args(Format)

_FILES = (CONFIG_FILE, "adapter_model*.safetensors*", mlx.WEIGHTS_FILE)
_SEALS = (SIGNATURE_FILE, STATEMENT_FILE)  # that the one written before may have had
_CARD, _LIBRARY = "README.md", "library_name: {}\n"  # by which the hub tells what loads it


class _Directory(Protocol):
    """A format that is a directory with a configuration and one file of weights."""

    WEIGHTS_FILE: str

    def config_of(self, adapter: Adapter) -> dict[str, Any]:
        """Return what `write` writes as configuration."""

    def write(self, adapter: Adapter, directory: Path) -> Mapping[str, Tensor]:
        """Write both files, and return the tensors as they are in the file."""


_DIRECTORIES: dict[str, _Directory] = {"peft": peft, "mlx": mlx}


def load_adapter(
    path: str | Path, base_model: str | Path | None = None, *, expert_layout: str | None = None
) -> Adapter:
    """Read an adapter and check every field and tensor of it.

    Args:
        path: a PEFT directory (``adapter_config.json`` and ``adapter_model.safetensors``, or its shards), one of mlx-lm
            (``adapters.safetensors``) or a GGUF LoRA file; as text also the id of a repository on the Hugging Face Hub,
            ``org/name``, ``org/name@revision`` or ``org/name@revision:sub/folder``.
        base_model: the model that a GGUF file is for, a GGUF file or a Hugging Face model directory. Some
            architectures need it, because their rows are reordered by heads that the file does not count.
        expert_layout: ``peft`` or ``unsloth``: who ordered the columns of fused experts. It is asked for where Unsloth
            wrote the file and nothing in it says which of its two orders they have.

    Raises:
        InputError: the adapter is missing or malformed, or does not fit ``base_model``.
        RefusedError: it is something that cannot be corrected as plain LoRA.

    >>> lora = csulora.load_adapter(adapter)
    >>> lora.modules["model.layers.0.self_attn.q_proj"].rank
    8
    """
    local = Path(path)
    if not local.exists():
        if isinstance(path, Path) or "/" not in path:
            raise InputError(
                f"{path}: no such adapter; name its directory, a GGUF file, or a hub id as text, such as org/name"
            )
        return replace(_read(local_path(path, _FILES), base_model, expert_layout), path=local)
    return _read(local, base_model, expert_layout)


def _read(path: Path, base_model: str | Path | None, expert_layout: str | None) -> Adapter:
    if not path.is_dir():
        return gguf.read(path, BaseModel.open(base_model) if base_model is not None else None)
    is_mlx = (path / mlx.WEIGHTS_FILE).exists() and not (path / peft.WEIGHTS_FILE).exists()
    return mlx.read(path) if is_mlx else peft.read(path, expert_layout)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    format: Format | None = None,
    *,
    base_model: str | Path | None = None,
    outtype: str | None = None,
    seal: Callable[[Path], None] | None = None,
) -> str:
    """Write an adapter, complete or not at all.

    Args:
        adapter: what `load_adapter` or `correct` returned.
        path: for ``peft`` and ``mlx``, a directory to create, with report and card if the adapter was corrected; one
            that csulora wrote before is replaced. For ``gguf``, a file to write.
        format: ``peft``, ``mlx`` or ``gguf``; None: ``gguf`` if ``path`` ends in .gguf, else the adapter's own.
        base_model: for ``gguf``, the model that llama.cpp will run it with.
        outtype: for ``gguf``, the type of the tensors: ``f32``, ``f16`` or ``bf16``; None keeps the adapter's.
        seal: signs what was written: adds files to a directory before it appears, or beside a GGUF file.

    Returns:
        The sha256 of what was written, as `load_adapter` finds it: of a directory's configuration and weights
        (its report states it too), or of a GGUF file.

    Raises:
        InputError: ``path`` cannot be created or is an input, or the adapter does not fit the format or the model, or
            has factors that could not be read back.
        RefusedError: llama.cpp has no place for one of its modules, or it holds copies of base matrices.

    >>> sha256 = csulora.save_adapter(csulora.load_adapter(adapter), "copy")
    >>> csulora.load_adapter("copy").sha256 == sha256
    True
    """
    return save_with_hashes(adapter, path, format, base_model=base_model, outtype=outtype, seal=seal)[0]


def save_with_hashes(
    adapter: Adapter,
    path: str | Path,
    format: Format | None = None,
    *,
    base_model: str | Path | None = None,
    outtype: str | None = None,
    seal: Callable[[Path], None] | None = None,
) -> tuple[str, dict[str, str]]:
    """Write as `save_adapter` does, and return besides what it returns the sha256 of each file: path -> hex.

    What ``seal`` adds is not among them: a signature is another each time.
    """
    check_type(adapter, Adapter, "adapter")
    _check_modules(adapter)
    path = Path(path)
    format = format or ("gguf" if is_gguf_name(path) else adapter.format)
    if adapter.copies:
        raise BaseCopyError(
            f"{adapter.path}: holds a copy of the base model's {min(adapter.copies)}, which only a correction compares "
            "with the model; correct the adapter (policy none changes nothing), or save it without: "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    check_not_inputs([path], [adapter.path, *(parts_beside(Path(base_model)) if base_model else [])])
    if format == "gguf":
        if base_model is None:
            raise InputError(
                f"{path}: a GGUF file is written for a model; name it (base_model, --base-model), or another format "
                "(--format peft)"
            )
        gguf.write(adapter, path, BaseModel.open(base_model), outtype)
        if seal:
            seal(path)
        sha256 = sha256_of_file(path)
        return sha256, {str(path): sha256}
    if format not in FORMATS:
        raise InputError(f"unknown adapter format {format!r}; it must be one of {', '.join(FORMATS)}")
    return _save_directory(adapter, path, format, seal)


def _check_modules(adapter: Adapter) -> None:
    """Raise `InputError` unless factors that somebody made in memory can be read back from a file."""
    if not adapter.modules:
        raise InputError(f"{adapter.path}: has no modules; an adapter without any could not be read back")
    for name, module in adapter.modules.items():
        check_in_memory(name, module, adapter.path)
        b, a = module.b, module.a
        is_update = b.dim() == a.dim() == 2 and b.shape[1] == a.shape[0] and b.numel() and a.numel()
        if not (is_update and b.dtype in DTYPES and a.dtype in DTYPES):
            raise InputError(
                f"{adapter.path}: {name} has b {list(b.shape)} {b.dtype} and a {list(a.shape)} {a.dtype}; (out, r) and "
                "(r, in) of floating point with two to eight bytes are needed"
            )
        if not (is_finite(a) and is_finite(b)):
            raise NotFiniteError(f"{adapter.path}: {name} holds NaN or infinity")
        of_one_dtype(a, b, name, adapter.path)


def weights_file_of(format: Format) -> str:
    """Return the name of the file of weights in a directory of a format."""
    return _DIRECTORIES[format].WEIGHTS_FILE


def config_as_written(adapter: Adapter, format: Format) -> dict[str, Any]:
    """Return the ``adapter_config.json`` that `save_adapter` writes for an adapter in a format that has one."""
    return _DIRECTORIES[format].config_of(_named_for(adapter, format))


def modules_as_written(adapter: Adapter, format: Format) -> Mapping[str, LoraModule]:
    """Return the modules under the names that `save_adapter` writes in a format."""
    return mlx.by_their_names(adapter) if format == "mlx" else _named_for(adapter, format).modules


def _named_for(adapter: Adapter, format: Format) -> Adapter:
    """Return an adapter of mlx-lm under the names by which PEFT finds its modules, if it is written for PEFT."""
    names = adapter.names_in_peft
    if format != "peft" or not names:
        return adapter
    modules = {names.get(name, name): module for name, module in adapter.modules.items()}
    return replace(adapter, modules=modules, names_in_peft={}, partial=True)


def _save_directory(
    adapter: Adapter, path: Path, format: Format, seal: Callable[[Path], None] | None
) -> tuple[str, dict[str, str]]:
    adapter, layout = _named_for(adapter, format), _DIRECTORIES[format]
    with atomic_directory(path, REPORT_FILE, _SEALS) as directory:
        hashes = hashes_as_written(directory / layout.WEIGHTS_FILE, layout.write(adapter, directory))
        sha256 = joined(*hashes.values())
        for name, text in adapter.documents.items():
            if name == REPORT_FILE:
                text = to_json(json.loads(text) | {CORRECTED_SHA256: sha256})
            elif name == _CARD:
                text = text.replace(_LIBRARY.format("peft"), _LIBRARY.format(format), 1)
            data = text.encode(errors="backslashreplace")
            (directory / name).write_bytes(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        if seal:
            seal(directory)
    return sha256, {str(path / name): found for name, found in hashes.items()}
