"""Factors of experts in GGUF LoRA files: lora_a (E, r, in) and lora_b (E, out, r) hold those of all of a layer.

llama.cpp takes it on trust that E and the other dimensions are the model's, and reads past the end of what is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from csulora.adapters.experts import joined, split
from csulora.adapters.factors import wide
from csulora.adapters.lora import LoraModule
from csulora.errors import InputError
from csulora.models import gguf_experts
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_experts import Stack
from csulora.subspace.expert_layout import ExpertLayout


def together(
    updates: Mapping[str, LoraModule], base: BaseModel
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield A and B of all experts, float32, with the GGUF name, less ``.weight``, of the tensor that they update.

    Experts without an update get zeros, and so do ranks below the largest. Scales are folded into B.

    Args:
        updates: by module; each is one of ``base``.
        base: the model.
    """
    for tensor in dict.fromkeys(map(base.expert_tensor, updates)):
        stack = gguf_experts.stack(tensor or "", base.architecture.experts)
        assert tensor
        assert stack
        yield tensor, _of_tensor(stack, base.number_of_experts[tensor], updates)


def apart(stack: Stack, a: torch.Tensor, b: torch.Tensor, scale: float, where: str) -> Iterator[tuple[str, LoraModule]]:
    """Yield every expert's updates by module, of factors (E, r, in) and (E, out, r).

    Raises:
        InputError: the rows of B are not those of gate and up.
    """
    for expert in range(len(a)):
        update, modules = LoraModule(b[expert], a[expert], scale), stack.modules(expert)
        halves = [update] if len(modules) == 1 else split(update, ExpertLayout(), where).values()
        yield from zip(modules, halves, strict=True)


def check_number(tensor: str, number: int, base: BaseModel, path: Path) -> None:
    """Raise `InputError` unless the model's tensor, a GGUF name less ``.weight``, is there and has as many experts."""
    expected = base.number_of_experts.get(tensor)
    if expected is None:
        raise InputError(f"{path}: {tensor} does not exist in {base.path}; the adapter is for another model")
    if number != expected:
        raise InputError(
            f"{path}: {tensor} has updates of {number} experts, but {base.path} has {expected}; the adapter is for "
            "another model"
        )


def _of_tensor(stack: Stack, number: int, updates: Mapping[str, LoraModule]) -> tuple[torch.Tensor, torch.Tensor]:
    found = {expert: _of_expert([updates.get(module) for module in stack.modules(expert)]) for expert in range(number)}
    present = [update for update in found.values() if update]
    rank, (rows, columns) = max(update.rank for update in present), present[0].shape
    a, b = torch.zeros(number, rank, columns), torch.zeros(number, rows, rank)
    for expert, update in found.items():
        if update is not None:
            filled = update.padded(rank)
            a[expert], b[expert] = filled.a, filled.b
    return a, b


def _of_expert(parts: list[LoraModule | None]) -> LoraModule | None:
    """Return the update of an expert's rows: of one projection, or of gate and up."""
    widened = [part and wide(part) for part in parts]
    if not any(widened):
        return None
    return widened[0] if len(parts) == 1 else joined(*widened, interleaved=False)
