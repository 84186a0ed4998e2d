"""The format of subspace files: safetensors whose metadata is one JSON text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora.errors import InputError
from csulora.io.files import atomic_file, parse_json
from csulora.io.tensors import save_tensors
from csulora.subspace.module_subspace import FACTORS, FILTER_FACTORS, SKETCH, ModuleSubspace
from csulora.subspace.provenance import Provenance

FORMAT_VERSION = 2

# All metadata is one JSON text under one key, because safetensors does not fix the order of several.
_METADATA_KEY = "csulora"

Modules = Mapping[str, ModuleSubspace]


def read(path: Path) -> tuple[dict[str, ModuleSubspace], Provenance]:
    """Map a subspace file and check its structure; the factors' values are not read.

    Raises:
        InputError: the file is not a subspace file, or its contents contradict each other.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a subspace file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; make a subspace file with `csulora extract`")
    try:
        if not _begins_as_safetensors(path):
            raise InputError(f"{path}: not a subspace file, but of another format; name what `csulora extract` made")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file: {error}; if it is a subspace file, it is cut off or damaged: "
            "copy it again, or make it again with `csulora extract`"
        ) from error
    if _METADATA_KEY not in metadata:
        raise InputError(f"{path}: not a subspace file; make one with `csulora extract`")
    return _parse(path, parse_json(metadata[_METADATA_KEY].encode(), path), tensors)


def _begins_as_safetensors(path: Path) -> bool:
    """Whether the header's JSON begins behind its length, or the file ends before."""
    with path.open("rb") as file:
        return file.read(9)[8:] in (b"{", b"")


def write(path: Path, modules: Modules, provenance: Provenance) -> None:
    """Write a subspace file, complete or not at all; a canary's for its owner alone."""
    with atomic_file(path, private=provenance.canary is not None) as temporary:
        save_tensors(_tensors(modules), temporary, _metadata(modules, provenance))


def sha256(modules: Modules, provenance: Provenance) -> str:
    """Return the hex sha256 of the bytes that `write` would write."""
    return hashlib.sha256(safetensors.torch.save(_tensors(modules), _metadata(modules, provenance))).hexdigest()


def document(modules: Modules, provenance: Provenance) -> dict[str, Any]:
    """Return everything but the factors, for JSON."""
    stated = asdict(provenance)
    if provenance.canary is None:  # as in files from before there were any
        del stated["canary"]
    return {
        **stated,
        "format": FORMAT_VERSION,
        "fingerprints": fingerprints(modules),
        "modules": {name: module.record() for name, module in modules.items()},
    }


def fingerprints(modules: Modules) -> dict[str, str]:
    """Return one sha256 per checkpoint, over the names and content hashes of the extracted tensors."""
    prints = {}
    for side in ("base", "aligned"):
        digest = hashlib.sha256()
        for name, module in sorted(modules.items()):
            digest.update(f"{name}\0{getattr(module, f'{side}_sha256')}\n".encode())
        prints[side] = digest.hexdigest()
    return prints


def _parse(
    path: Path, document: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, ModuleSubspace], Provenance]:
    version = document.pop("format", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: subspace file format {version}; this csulora reads format {FORMAT_VERSION}; "
            "make it again with `csulora extract`"
        )
    try:
        stated, records = document.pop("fingerprints"), document.pop("modules")
        modules = {name: _module(name, record, tensors) for name, record in records.items()}
        provenance = Provenance.from_record(document)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: the subspace file's metadata is damaged ({error!r})") from error
    if len(tensors) != len(_tensors(modules)):
        raise InputError(f"{path}: holds tensors that no module accounts for")
    _check_sketches(path, modules, provenance)
    if fingerprints(modules) != stated:
        raise InputError(f"{path}: fingerprints and content hashes contradict each other; the subspace file is damaged")
    if any(target not in modules for target in (*provenance.aliases.values(), *provenance.names.values())):
        raise InputError(f"{path}: an alias names a module that the subspace file does not hold")
    return modules, provenance


def _check_sketches(path: Path, modules: Modules, provenance: Provenance) -> None:
    columns = {module.sketch.shape[1] for module in modules.values() if module.sketch is not None}
    seed = provenance.options.get("seed")
    if columns and not (len(columns) == 1 and type(seed) is int and 0 <= seed < 2**63):
        raise InputError(f"{path}: its sketches have no common number of columns, or no seed; the file is damaged")


def _module(name: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModuleSubspace:
    every = (*FACTORS, *FILTER_FACTORS, SKETCH)
    factors = {factor: tensors[f"{name}.{factor}"] for factor in every if f"{name}.{factor}" in tensors}
    if not set(FACTORS) <= set(factors) or len(set(FILTER_FACTORS) & set(factors)) == 1:
        raise InputError(f"{name}: a factor is missing")
    try:
        return ModuleSubspace.from_record(record, factors)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _tensors(modules: Modules) -> dict[str, Tensor]:
    return {
        f"{name}.{factor}": tensor.contiguous()
        for name, module in modules.items()
        for factor, tensor in module.tensors().items()
    }


def _metadata(modules: Modules, provenance: Provenance) -> dict[str, str]:
    return {_METADATA_KEY: json.dumps(document(modules, provenance), sort_keys=True, allow_nan=False)}
