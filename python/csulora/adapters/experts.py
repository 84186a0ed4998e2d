"""Updates of experts: taken apart to one virtual module per expert and projection, and put together again.

Hosts keep the gate and up projections of an expert in one parameter, ``gate_up_proj``, and PEFT adapts that parameter.
A correction needs them apart, because alignment moved them apart: ``experts.3.gate_up_proj`` becomes
``experts.3.gate_proj`` and ``experts.3.up_proj``, which share A.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from csulora.adapters.lora import Adapter, LoraModule, stacked
from csulora.errors import InputError, OtherFamilyError
from csulora.models.names import parse_expert
from csulora.subspace.expert_layout import ExpertLayout

GATE_UP, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"


def is_fused(adapter: Adapter) -> bool:
    """Whether the adapter updates experts as PEFT does, by parameters that hold all of them."""
    return any(map(is_parameter_of_experts, adapter.config.get("target_parameters") or []))


def is_parameter_of_experts(name: str) -> bool:
    """Whether a name in ``target_parameters`` is that of stacked experts, and not of a matrix.

    >>> [is_parameter_of_experts(name) for name in ("mlp.experts.down_proj", "gate_up_proj", "mlp.gate.weight")]
    [True, True, False]
    """
    return name.rpartition(".")[2] in (GATE_UP, UP, DOWN)


def decoded(adapter: Adapter, layout: ExpertLayout | None) -> Adapter:
    """Take the updates of experts apart, to one module per expert and projection, oriented (out, in).

    Args:
        adapter: what a format's reader returned.
        layout: that of the model; None if it is not known.

    Raises:
        RefusedError: the adapter's experts are fused, and ``layout`` is None.
        InputError: the factors do not fit the model's experts.
    """
    if not is_fused(adapter) or adapter.is_decoded:
        return adapter
    if layout is None:
        raise OtherFamilyError(
            f"{adapter.path}: updates fused experts, and the subspace file does not say how its model lays them out; "
            "use the subspace file of its own model, and extract that again if it does not say so either"
        )
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if (found := parse_expert(name)) is None:
            modules[name] = module
            continue
        experts, expert, projection = found
        oriented = _exchanged(module) if layout.exchanged else module
        parts = split(oriented, layout, f"{adapter.path}: {name}") if projection == GATE_UP else {projection: oriented}
        for part, update in parts.items():
            modules[f"{experts}.{expert}.{part}"] = update
    return replace(adapter, modules=modules, is_decoded=True)


def encoded(adapter: Adapter, layout: ExpertLayout | None) -> Adapter:
    """Put together what `decoded` took apart: gate and up side by side, of both ranks unless they share A."""
    if not adapter.is_decoded or layout is None:
        return adapter
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        found = parse_expert(name)
        if found is None:
            modules[name] = module
            continue
        experts, expert, projection = found
        if projection in (GATE, UP) and is_targeted(f"{experts}.{GATE_UP}", adapter.config["target_parameters"]):
            name = f"{experts}.{expert}.{GATE_UP}"
            if name in modules:
                continue
            halves = (adapter.modules.get(f"{experts}.{expert}.{half}") for half in (GATE, UP))
            module = joined(*halves, interleaved=layout.interleaved)
        modules[name] = _exchanged(module) if layout.exchanged else module
    return replace(adapter, modules=modules, is_decoded=False)


def is_targeted(parameter: str, target_parameters: Iterable[str]) -> bool:
    """Whether PEFT would adapt a parameter, under PEFT's rule for ``target_parameters``."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in target_parameters)


def split(module: LoraModule, layout: ExpertLayout, where: str) -> dict[str, LoraModule]:
    """Return the updates of gate and up; they share A unless one's columns of B are zero where the other's are not."""
    rows = module.b.shape[0]
    if rows % 2:
        raise InputError(f"{where} has {rows} rows; gate and up have as many each")
    gate, up = (module.b[0::2], module.b[1::2]) if layout.interleaved else module.b.chunk(2)
    a_gate, a_up = module.a, module.a
    rank, odd = divmod(module.rank, 2)
    if not odd and _is_zero(gate[:, rank:]) and _is_zero(up[:, :rank]):  # two side by side, as PEFT fuses them
        gate, up, a_gate, a_up = gate[:, :rank], up[:, rank:], module.a[:rank], module.a[rank:]
    return {GATE: replace(module, b=gate, a=a_gate), UP: replace(module, b=up, a=a_up)}


def _is_zero(b: torch.Tensor) -> bool:
    """Whether all entries are 0; where they are not, the first row tells at once."""
    return not (b[:1].any() or b.any())


def joined(gate: LoraModule | None, up: LoraModule | None, *, interleaved: bool) -> LoraModule:
    """Return the update whose rows are those of both; one that was dropped is zero."""
    gate, up = gate or _zero(up), up or _zero(gate)
    rows = gate.b.shape[0]
    of_gate, of_up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(rows), slice(rows, None))
    return stacked([(of_gate, gate), (of_up, up)], 2 * rows)


def _zero(like: LoraModule | None) -> LoraModule:
    assert like is not None
    return replace(like, b=torch.zeros_like(like.b))


def _exchanged(module: LoraModule) -> LoraModule:
    """Return the transpose of an update."""
    return replace(module, b=module.a.t(), a=module.b.t())
