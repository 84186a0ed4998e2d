"""Updates of experts in a model that keeps all experts of a layer in parameters with three dimensions.

No module computes with one expert alone, so that a parameter gives way to its sum with the updates while they last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from csulora.adapters.experts import DOWN, GATE, GATE_UP, UP
from csulora.errors import InputError
from csulora.models.names import parse_expert
from csulora.subspace.expert_layout import ExpertLayout
from csulora.subspace.input_filter import Factors

OfExperts = dict[tuple[int, str], Factors]
"""Factors by expert and projection, (out, r) and (r, in)."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked parameters of experts."""
    return DOWN in module._parameters and (GATE_UP in module._parameters or UP in module._parameters)


def by_experts_module(factors: Mapping[str, Factors]) -> tuple[dict[str, OfExperts], dict[str, Factors]]:
    """Sort factors by experts module, and those of other modules."""
    of_experts: dict[str, OfExperts] = {}
    others: dict[str, Factors] = {}
    for name, each in factors.items():
        if (found := parse_expert(name)) is None:
            others[name] = each
        else:
            of_experts.setdefault(found[0], {})[found[1], found[2]] = each
    return of_experts, others


@contextmanager
def adapted_experts(module: nn.Module, updates: OfExperts, layout: ExpertLayout, name: str) -> Iterator[None]:
    """Add b a to projections of experts while the context lasts.

    Raises:
        InputError: the module has no such projection, or one of another shape.
    """
    parameters: dict[str, Tensor] = {}
    for (expert, projection), each in updates.items():
        parameter = _parameter_of(module, projection, name)
        if parameter not in parameters:
            parameters[parameter] = torch.zeros_like(module.get_parameter(parameter), dtype=torch.float32)
        matrix = _view(parameters[parameter], module, expert, projection, layout, name)
        b, a = (factor.to(matrix.device) for factor in each)
        if matrix.shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"{name}.{expert}.{projection} is {list(matrix.shape)} in the model, and the adapter updates "
                f"{[b.shape[0], a.shape[1]]}"
            )
        matrix += b @ a
    originals = dict(module._parameters)  # in their order, on which PEFT depends
    try:
        for parameter, change in parameters.items():
            original = module._parameters.pop(parameter)
            assert original is not None
            setattr(module, parameter, original + change.to(original.dtype))
        yield
    finally:
        for parameter in parameters:
            module.__dict__.pop(parameter, None)
        module._parameters.clear()
        module._parameters.update(originals)


def _parameter_of(module: nn.Module, projection: str, name: str) -> str:
    fused = GATE_UP if projection in (GATE, UP) and GATE_UP in module._parameters else projection
    if fused not in module._parameters:
        raise InputError(f"{name} has no {projection} in the model, which the adapter updates; is it for this model?")
    return fused


def _view(stacked: Tensor, module: nn.Module, expert: int, projection: str, layout: ExpertLayout, name: str) -> Tensor:
    """Return one projection, (out, in), of a stacked parameter."""
    if expert >= len(stacked):
        raise InputError(f"{name} has {len(stacked)} experts in the model, and the adapter updates number {expert}")
    # (E, in, out) where the module says so, and where PEFT exchanges sides because it does not.
    is_transposed = getattr(module, "is_transposed", False) or layout.exchanged
    matrix = stacked[expert].t() if is_transposed else stacked[expert]
    if projection == DOWN or GATE_UP not in module._parameters:
        return matrix
    second = projection == UP
    half = len(matrix) // 2
    return matrix[second::2] if layout.interleaved else matrix.narrow(0, second * half, half)
