"""Tiny model pairs and adapters of any shapes, the same every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

import csulora

Shapes = Mapping[str, tuple[int, int]]  # module -> rows and columns


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    """Return a reproducible random matrix."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_subspace(directory: Path, shapes: Shapes, rank: int, config: Mapping[str, object] | None = None) -> Path:
    """Write two checkpoints that differ by updates of a rank, ``base`` and ``aligned``, and extract a subspace file."""
    for name, moved in (("base", 0.0), ("aligned", 0.1)):
        weights = {}
        for i, (module, (rows, columns)) in enumerate(shapes.items()):
            change = gaussian(rows, rank, seed=i + 100) @ gaussian(rank, columns, seed=i + 200)
            weights[f"{module}.weight"] = gaussian(rows, columns, seed=i) + moved * change
        (directory / name).mkdir()
        safetensors.torch.save_file(weights, directory / name / "model.safetensors")
        (directory / name / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    subspace = directory / "subspace.safetensors"
    csulora.extract(directory / "base", directory / "aligned", rank=rank, output=subspace)
    return subspace


def make_adapter(
    directory: Path, shapes: Shapes, seed: int, rank: int, settings: Mapping[str, object] | None = None
) -> Path:
    """Write a PEFT adapter whose factors have a rank, with settings that may say otherwise."""
    directory.mkdir(parents=True)
    tensors = {}
    for i, (module, (rows, columns)) in enumerate(shapes.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = gaussian(rank, columns, seed=1000 * seed + i)
        tensors[f"base_model.model.{module}.lora_B.weight"] = gaussian(rows, rank, seed=1000 * seed + i + 500)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(shapes), **(settings or {})}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    return directory
