"""Updates of experts: taken apart to one virtual module per expert and projection, and put together again.

Hosts keep the gate and up projections of an expert in one parameter, ``gate_up_proj``, and PEFT adapts that parameter.
A correction needs them apart, because alignment moved them apart: ``experts.3.gate_up_proj`` becomes
``experts.3.gate_proj`` and ``experts.3.up_proj``, which share A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice, takewhile
from pathlib import Path

import torch

from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import InputError, RefusedError
from csulora.models.names import WEIGHT, projection_of
from csulora.subspace.expert_layout import ExpertLayout

GATE_UP, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"

PER_EXPERT, FUSED = "per-expert", "fused"
LAYOUTS = (PER_EXPERT, FUSED)

_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<expert>\d{1,6})\.(?P<projection>\w+)")


def parsed(module: str) -> tuple[str, int, str] | None:
    """Return the experts module, the expert and the projection that a name says; None if it is no expert's.

    >>> parsed("model.layers.0.mlp.experts.3.gate_proj")
    ('model.layers.0.mlp.experts', 3, 'gate_proj')
    """
    found = _EXPERT.fullmatch(module)
    return (found["experts"], int(found["expert"]), found["projection"]) if found else None


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
        RefusedError: the adapter's experts are fused, and ``layout`` is None, or they are there one by one too.
        InputError: the factors do not fit the model's experts.
    """
    if not is_fused(adapter):
        return adapter
    if layout is None:
        raise RefusedError(_unknown_layout(adapter))
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if (found := parsed(name)) is None:
            modules[name] = module
            continue
        experts, expert, projection = found
        oriented = _exchanged(module) if layout.exchanged else module
        parts = _parts(oriented, layout, f"{adapter.path}: {name}") if projection == GATE_UP else {projection: oriented}
        for part, update in parts.items():
            whole = f"{experts}.{expert}.{part}"
            if whole in modules or (whole != name and whole in adapter.modules):
                raise in_two_layouts(whole, adapter.path)
            modules[whole] = update
    return replace(adapter, modules=modules)


def in_two_layouts(module: str, path: Path) -> RefusedError:
    """Return what to raise where a file updates an expert twice."""
    return RefusedError(
        f"{path}: updates {module} both among fused experts and by itself; hosts disagree on which of them they apply"
    )


def check_counts(adapter: Adapter, is_known: Callable[[str], bool]) -> None:
    """Raise unless fused factors hold as many experts as the model has.

    A host that counts for itself would take them apart otherwise than the file says.

    Args:
        adapter: what `decoded` returned.
        is_known: whether the model has a module; where it has no expert at all, nothing is checked.

    Raises:
        InputError: there are more or fewer.
    """
    held: dict[tuple[str, str], int] = {}
    for name in adapter.modules if is_fused(adapter) else ():
        if (found := parsed(name)) and found[2] in (GATE, UP, DOWN):
            experts, expert, projection = found
            held[experts, projection] = max(held.get((experts, projection), 0), expert + 1)
    for (experts, projection), number in held.items():
        names = (f"{experts}.{expert}.{projection}" for expert in count())
        known = sum(1 for _ in takewhile(is_known, islice(names, number + 1)))
        if known not in (0, number):
            more = "more" if known > number else str(known)
            raise InputError(
                f"{adapter.path}: updates {number} experts of {experts}, and the model has {more}; it is for another"
            )


def encoded(adapter: Adapter, layout: ExpertLayout | None) -> Adapter:
    """Put together what `decoded` took apart: gate and up side by side, of both ranks unless they share A."""
    if not is_fused(adapter) or layout is None:
        return adapter
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        found = parsed(name)
        if found is None:
            modules[name] = module
            continue
        experts, expert, projection = found
        if projection in (GATE, UP) and is_targeted(f"{experts}.{GATE_UP}", adapter.config["target_parameters"]):
            name = f"{experts}.{expert}.{GATE_UP}"
            if name in modules:
                continue
            halves = (adapter.modules.get(f"{experts}.{expert}.{half}") for half in (GATE, UP))
            module = _joined(*halves, interleaved=layout.interleaved)
        modules[name] = _exchanged(module) if layout.exchanged else module
    return replace(adapter, modules=modules)


def per_expert(adapter: Adapter, layout: ExpertLayout | None, stored_name: Callable[[str], str]) -> Adapter:
    """Return a decoded adapter as one with a pair of factors for each expert and projection.

    PEFT fuses such an adapter as it loads it, if experts and router have one rank and all projections are there.

    Args:
        adapter: what `decoded` returned.
        layout: that of the model; None if it is not known.
        stored_name: gives what the model's checkpoint calls a projection of an expert.

    Raises:
        RefusedError: no host reads the model's experts so.
    """
    if layout is None or not layout.per_expert:
        raise RefusedError(
            f"{adapter.path}: nothing reads this model's experts one by one; leave out the layout to keep them fused"
        )
    parameters = adapter.config.get("target_parameters") or []
    matrices = {name for name in adapter.modules if is_targeted(f"{name}{WEIGHT}", parameters)}
    whole = adapter.modules | _zeros(adapter)
    rank = max((module.rank for name, module in whole.items() if parsed(name)), default=0)
    modules: dict[str, LoraModule] = {}
    for name, module in whole.items():
        if parsed(name):
            filled = padded(module, rank)
            # A file cannot hold one tensor under the names of gate and up, which share it where nothing was changed.
            modules[stored_name(name)] = replace(filled, a=filled.a.clone())
        else:
            modules[name] = padded(module, rank) if name in matrices else module
    listed = adapter.config.get("target_modules") or []
    endings = {name.rpartition(".")[2] for name in modules if parsed(name) or name in matrices}
    targets = listed if isinstance(listed, str) else sorted({*listed, *endings})
    return replace(
        adapter, modules=modules, config=adapter.config | {"target_modules": targets, "target_parameters": []}
    )


def fused(
    adapter: Adapter,
    layout: ExpertLayout | None,
    name_in_memory: Callable[[str], str],
    is_known: Callable[[str], bool],
) -> Adapter:
    """Return an adapter of single experts as PEFT fuses it on transformers 5; one that is fused stays so.

    Args:
        adapter: what `decoded` returned.
        layout: that of the model; None if it is not known.
        name_in_memory: gives what transformers calls a module, but for the projection of an expert.
        is_known: whether the model has a module; experts of its without an update get one of zero.

    Raises:
        RefusedError: it is not known how the model lays out its experts, or it has no such expert.
    """
    if is_fused(adapter) or not any(map(parsed, adapter.modules)):
        return encoded(adapter, layout)
    if layout is None:
        raise RefusedError(_unknown_layout(adapter))
    modules: dict[str, LoraModule] = {}
    found: dict[str, dict[tuple[int, str], LoraModule]] = {}
    for name, module in adapter.modules.items():
        if parsed(name) is None:
            modules[name_in_memory(name)] = module
            continue
        if not is_known(name):
            raise RefusedError(f"{adapter.path}: {name} is none of the model's experts, which fused factors hold")
        owner, expert, projection = parsed(name_in_memory(name)) or ("", 0, "")
        found.setdefault(owner, {})[expert, projection_of(projection)] = module
    parameters = [f"{name}{WEIGHT}" for owner in found for name in _routers(owner) if name in modules]
    for owner, updates in found.items():
        parts = (GATE, UP) if is_known(f"{owner}.0.{GATE}") else (UP,)
        for parameter, projections in ((GATE_UP if len(parts) == 2 else UP, parts), (DOWN, (DOWN,))):
            if given := {key: module for key, module in updates.items() if key[1] in projections}:
                parameters.append(f"{owner}.{parameter}")
                modules |= _completed(owner, given, projections, is_known)
    config = adapter.config | {"target_parameters": parameters}
    return encoded(replace(adapter, modules=modules, config=config, partial=True), layout)


def _completed(
    owner: str,
    given: Mapping[tuple[int, str], LoraModule],
    projections: Sequence[str],
    is_known: Callable[[str], bool],
) -> dict[str, LoraModule]:
    """Return updates of all experts in a common rank, of zero where none was given."""
    some = next(iter(given.values()))
    nothing = replace(some, b=torch.zeros_like(some.b))
    rank = max(module.rank for module in given.values())
    modules: dict[str, LoraModule] = {}
    for expert in takewhile(lambda expert: is_known(f"{owner}.{expert}.{projections[-1]}"), count()):
        for projection in projections:
            modules[f"{owner}.{expert}.{projection}"] = padded(given.get((expert, projection), nothing), rank)
    return modules


def _routers(owner: str) -> tuple[str, str]:
    """Return what the router beside some experts may be called, which transformers 5 keeps as a bare parameter."""
    parent = owner.rpartition(".")[0]
    return f"{parent}.gate", f"{parent}.router"


def _unknown_layout(adapter: Adapter) -> str:
    return (
        f"{adapter.path}: updates fused experts, and the subspace file does not say how its model lays them out; "
        "extract it again from the model's checkpoints"
    )


def is_targeted(parameter: str, target_parameters: Iterable[str]) -> bool:
    """Whether PEFT would adapt a parameter, under PEFT's rule for ``target_parameters``."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in target_parameters)


def _zeros(adapter: Adapter) -> dict[str, LoraModule]:
    """Return an update of zero for each projection of an updated expert that has none."""
    found: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if (of_expert := parsed(name)) is None:
            continue
        experts, expert, projection = of_expert
        for other in (GATE, UP, DOWN):
            if (missing := f"{experts}.{expert}.{other}") in adapter.modules or missing in found:
                continue
            rows, columns = module.shape if (projection == DOWN) == (other == DOWN) else reversed(module.shape)
            found[missing] = LoraModule(module.b.new_zeros(rows, 1), module.a.new_zeros(1, columns))
    return found


def padded(module: LoraModule, rank: int) -> LoraModule:
    """Return the same update with as many columns of ``b``, the further ones zero."""
    missing = rank - module.rank
    if not missing:
        return module
    b = torch.cat([module.b, module.b.new_zeros(module.b.shape[0], missing)], dim=1)
    return replace(module, b=b, a=torch.cat([module.a, module.a.new_zeros(missing, module.a.shape[1])]))


def _parts(module: LoraModule, layout: ExpertLayout, where: str) -> dict[str, LoraModule]:
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


def _joined(gate: LoraModule | None, up: LoraModule | None, *, interleaved: bool) -> LoraModule:
    """Return the update whose rows are those of both; one that was dropped is zero."""
    gate, up = gate or _zero(up), up or _zero(gate)
    gate, up = gate.folded(), up.folded()
    shared = gate.a.shape == up.a.shape and torch.equal(gate.a, up.a)
    rows, rank = gate.b.shape[0], gate.rank if shared else gate.rank + up.rank
    b = gate.b.new_empty(2 * rows, rank)
    of_gate, of_up = (b[0::2], b[1::2]) if interleaved else (b[:rows], b[rows:])
    of_gate[:, : gate.rank] = gate.b
    of_up[:, rank - up.rank :] = up.b
    if shared:
        return LoraModule(b, gate.a)
    of_gate[:, gate.rank :] = 0
    of_up[:, : gate.rank] = 0
    a = gate.a.new_empty(rank, gate.a.shape[1])
    a[: gate.rank], a[gate.rank :] = gate.a, up.a
    return LoraModule(b, a)


def _zero(like: LoraModule | None) -> LoraModule:
    assert like is not None
    return replace(like, b=torch.zeros_like(like.b))


def _exchanged(module: LoraModule) -> LoraModule:
    """Return the transpose of an update."""
    return replace(module, b=module.a.t(), a=module.b.t())
