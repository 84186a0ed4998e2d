"""Factors of experts in GGUF LoRA files: lora_a (E, r, in) and lora_b (E, out, r) hold those of all of a layer.

llama.cpp takes it on trust that E and the other dimensions are the model's, and reads past the end of what is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from csulora.adapters.experts import joined, padded
from csulora.adapters.lora import LoraModule
from csulora.models import gguf_experts
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_experts import Stack


def together(updates: Mapping[str, LoraModule], base: BaseModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of all experts by the GGUF name, less ``.weight``, of the tensor that they update.

    Experts without an update get zeros, and so do ranks below the largest.

    Args:
        updates: by module; each is one of ``base``, float32, and has scale 1.
        base: the model.
    """
    factors = {}
    for tensor in dict.fromkeys(map(base.expert_tensor, updates)):
        stack = gguf_experts.stack(tensor or "", base.architecture.experts)
        assert tensor
        assert stack
        factors[tensor] = _of_tensor(stack, base.number_of_experts[tensor], updates)
    return factors


def apart(stack: Stack, a: torch.Tensor, b: torch.Tensor, scale: float) -> Iterator[tuple[str, LoraModule]]:
    """Yield every expert's updates by module, of factors (E, r, in) and (E, out, r)."""
    for expert in range(len(a)):
        modules = stack.modules(expert)
        for module, rows in zip(modules, b[expert].chunk(len(modules)), strict=True):
            yield module, LoraModule(rows, a[expert], scale)


def _of_tensor(stack: Stack, number: int, updates: Mapping[str, LoraModule]) -> tuple[torch.Tensor, torch.Tensor]:
    found = {expert: _of_expert([updates.get(module) for module in stack.modules(expert)]) for expert in range(number)}
    present = [update for update in found.values() if update]
    rank, (rows, columns) = max(update.rank for update in present), present[0].shape
    a, b = torch.zeros(number, rank, columns), torch.zeros(number, rows, rank)
    for expert, update in found.items():
        if update is not None:
            filled = padded(update, rank)
            a[expert], b[expert] = filled.a, filled.b
    return a, b


def _of_expert(parts: list[LoraModule | None]) -> LoraModule | None:
    """Return the update of an expert's rows: of one projection, or of gate and up."""
    if not any(parts):
        return None
    return parts[0] if len(parts) == 1 else joined(*parts, interleaved=False)
