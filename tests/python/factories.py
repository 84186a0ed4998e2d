"""Tiny random inputs: matrices with a given spectrum, subspaces, updates, checkpoints, subspace files."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from csulora.adapters.lora import Adapter, LoraModule
from csulora.native import _core
from csulora.serving.decisions import Decision
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance, StoredMatrix
from csulora.subspace.subspace import Subspace

# Three modules of a small model: square, wide and tall.
SHAPES = {
    "model.layers.0.mlp.down_proj": (40, 56),
    "model.layers.0.mlp.up_proj": (56, 40),
    "model.layers.0.self_attn.q_proj": (40, 40),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes as a file stores them."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@cache
def without_memory(*shape: int) -> Tensor:
    """A tensor as FSDP leaves it between two passes: on a device, with a shape, and nothing behind it."""
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) float64 with orthonormal columns."""
    basis: Tensor = torch.linalg.qr(gaussian(rows, columns, seed=seed, dtype=torch.float64)).Q
    return basis


@cache
def cosines(size: int) -> Tensor:
    """(size, size) float32 orthonormal: the discrete cosine basis, which costs no decomposition."""
    angles = (torch.arange(size).double() + 0.5).unsqueeze(1) * torch.arange(size) * (math.pi / size)
    basis = angles.cos() * math.sqrt(2 / size)
    basis[:, 0] /= math.sqrt(2)
    return basis.float()


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """(rows, columns) float64 with these singular values and random singular vectors."""
    left, right = orthonormal(rows, len(values), seed), orthonormal(columns, len(values), seed + 1)
    return (left * values) @ right.t()


def core_subspace(
    rows: int, columns: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> _core.Subspace:
    """A random subspace with slowly falling singular values, as the core takes it."""
    u, v = orthonormal(rows, rank, seed), orthonormal(columns, rank, seed + 1)
    s = torch.arange(1, rank + 1).double().rsqrt()
    return _core.Subspace(u.to(dtype), s.float(), v.to(dtype))


def lora_factors(
    rows: int,
    columns: int,
    rank: int,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> _core.LoraFactors:
    b, a = gaussian(rows, rank, seed=seed), gaussian(rank, columns, seed=seed + 1)
    return _core.LoraFactors(b.to(dtype), a.to(dtype), scale)


def subspace(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    aliases: Mapping[str, str] | None = None,
    vocabulary: Mapping[str, StoredMatrix] | None = None,
    names: Mapping[str, str] | None = None,
) -> Subspace:
    """A subspace file in memory, with random subspaces and an invented certificate."""
    certificate = Certificate(2.0, 0.9, 1e-3, 1e-4, 0.1, 1e-3, 0.01, rank, 5)
    modules = {}
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        factors = core_subspace(rows, columns, rank, seed + 2 * i, dtype)
        modules[name] = ModuleSubspace(factors.u, factors.s, factors.v, certificate, f"{i:064x}", f"{i + 1:064x}")
    provenance = Provenance("0", "base", "aligned", {}, dict(aliases or {}), dict(names or {}), dict(vocabulary or {}))
    return Subspace(modules, provenance)


def adapter(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 4,
    seed: int = 100,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """A random plain LoRA adapter in memory."""
    modules = {}
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        factors = lora_factors(rows, columns, rank, seed + 2 * i, scale, dtype)
        modules[name] = LoraModule(factors.b, factors.a, scale)
    return Adapter(modules, {"r": rank, "base_model_name_or_path": "org/base"}, Path("some/adapter"), "ab" * 32)


def llama_weights(
    layers: int = 2, width: int = 48, hidden: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A Llama's weights: attention with fewer key than query heads, MLP, norms, embedding, untied head."""
    shapes = {"model.embed_tokens": (40, width), "lm_head": (40, width), "model.norm": (width,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj": (width, width),
            f"{prefix}.self_attn.k_proj": (width // 2, width),
            f"{prefix}.self_attn.v_proj": (width // 2, width),
            f"{prefix}.self_attn.o_proj": (width, width),
            f"{prefix}.mlp.gate_proj": (hidden, width),
            f"{prefix}.mlp.up_proj": (hidden, width),
            f"{prefix}.mlp.down_proj": (width, hidden),
            f"{prefix}.input_layernorm": (width,),
        }
    return {
        f"{name}.weight": gaussian(*shape, seed=seed + i).to(dtype) for i, (name, shape) in enumerate(shapes.items())
    }


def moved(weights: Mapping[str, Tensor], seed: int = 1, size: float = 0.1, rank: int = 6) -> dict[str, Tensor]:
    """The weights after an alignment: every matrix displaced by a low-rank change and a little noise."""
    result = {}
    for i, (name, weight) in enumerate(weights.items()):
        if weight.dim() == 2:
            low_rank = gaussian(weight.shape[0], rank, seed=seed + i) @ gaussian(rank, weight.shape[1], seed=-i - 1)
            change = size * low_rank + 0.01 * size * gaussian(*weight.shape, seed=seed + 1000 + i)
            result[name] = (weight.float() + change).to(weight.dtype)
        else:
            result[name] = weight
    return result


def save_checkpoint(
    directory: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, object] | None = None,
    shards: int = 1,
) -> Path:
    """Write a Hugging Face model directory, in one file or several."""
    directory.mkdir(parents=True)
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(settings | dict(config or {})))
    if shards == 1:
        save_file(dict(weights), directory / "model.safetensors", {"format": "pt"})
        return directory
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = names[shard::shards]
        save_file({name: weights[name] for name in chosen}, directory / file, {"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def model_pair(directory: Path, layers: int = 2, seed: int = 0, **save: Any) -> tuple[Path, Path]:
    """A base and an aligned checkpoint."""
    base = llama_weights(layers, seed=seed)
    return (
        save_checkpoint(directory / "base", base, **save),
        save_checkpoint(directory / "aligned", moved(base), **save),
    )


def save_adapter(
    directory: Path,
    modules: Mapping[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Write a plain PEFT adapter by hand for modules of the given (out, in) shapes."""
    directory.mkdir(parents=True)
    tensors = {}
    for i, (name, (rows, columns)) in enumerate(modules.items()):
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = gaussian(rank, columns, seed=seed + 2 * i).to(dtype)
        tensors[f"{prefix}.lora_B.weight"] = gaussian(rows, rank, seed=seed + 2 * i + 1).to(dtype)
    targets: Sequence[str] = sorted({name.rpartition(".")[2] for name in modules})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def opposing_adapter(directory: Path, subspace: Subspace, modules: Mapping[str, tuple[int, int]], undo: float) -> Path:
    """Write a PEFT adapter that undoes this share of the alignment of each module, and does nothing else."""
    tensors, rank = {}, 0
    for name in modules:
        found = subspace[name]
        prefix, rank = f"base_model.model.{name}", len(found.s)
        tensors[f"{prefix}.lora_A.weight"] = found.v.float().t().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (-undo * found.u.float() * found.s).contiguous()
    directory.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def decision(**changes: Any) -> Decision:
    """The record of a refusal."""
    fields: dict[str, Any] = {
        "id": "0123456789abcdef",
        "route": "guard",
        "name": "adapter",
        "path": "/uploads/adapter",
        "inputs": {"adapter_config.json": "1" * 64},
        "adapter_sha256": None,
        "subspace": None,
        "subspace_sha256": "2" * 64,
        "policy": "csulora",
        "policy_sha256": "3" * 64,
        "policy_text": "off = 1.0\n",
        "base_model": None,
        "fingerprint": "4" * 64,
        "verdict": "refused",
        "reason_code": "undo-limit",
        "reason": "a reason: ü",
        "outputs": {},
        "form": None,
        "recalled": False,
        "totals": None,
        "seconds": 0.25,
    }
    return Decision(**fields | changes)
