"""Files of the shapes of Llamas: a subspace file and an adapter, filled with random numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

import csulora
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance
from csulora.subspace.subspace import Subspace

RANK, DIRECTIONS = 16, 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    width: int
    hidden: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers with their (out, in)."""
        narrow = self.width // self.heads * self.key_value_heads
        kinds = {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (narrow, self.width),
            "self_attn.v_proj": (narrow, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.hidden, self.width),
            "mlp.up_proj": (self.hidden, self.width),
            "mlp.down_proj": (self.width, self.hidden),
        }
        return {f"model.layers.{i}.{kind}": size for i in range(self.layers) for kind, size in kinds.items()}


SHAPES = {
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shape(2, 128, 256, 4, 2, 256),
}


def make_subspace(shape: Shape, path: Path) -> Subspace:
    """Write a subspace file of random subspaces, the same for modules of one shape, and open it."""

    def orthonormal(rows: int) -> torch.Tensor:
        basis: torch.Tensor = torch.linalg.qr(torch.randn(rows, min(DIRECTIONS, rows)))[0]
        return basis.half()

    bases = {rows: orthonormal(rows) for size in shape.modules().values() for rows in size}
    certificate = Certificate(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, DIRECTIONS, 1)
    modules = {}
    for name, (rows, columns) in shape.modules().items():
        k = min(DIRECTIONS, rows, columns)
        u, v = bases[rows][:, :k].contiguous(), bases[columns][:, :k].contiguous()
        modules[name] = ModuleSubspace(u, torch.linspace(1.0, 0.1, k), v, certificate, "0" * 64, "1" * 64)
    Subspace(modules, Provenance(csulora.__version__, "random", "random", {}, {})).save(path)
    return Subspace.open(path)


def make_adapter(shape: Shape, directory: Path, dtype: torch.dtype) -> Path:
    """Write a random adapter for every linear layer."""
    tensors = {}
    for name, (rows, columns) in shape.modules().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(RANK, columns) / columns**0.5).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (0.01 * torch.randn(rows, RANK)).to(dtype)
    directory.mkdir()
    targets = sorted({name.rpartition(".")[2] for name in shape.modules()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    return directory
