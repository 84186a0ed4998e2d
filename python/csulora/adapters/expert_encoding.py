"""Updates of experts in a layout that is asked for: a pair of factors for each one, or one for all of a layer.

Hosts want every expert of a layer and each of its projections; what an adapter does not update is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple, Self, get_args

from csulora.adapters.experts import (
    DOWN,
    GATE,
    GATE_UP,
    encoded,
    is_parameter_of_experts,
    is_targeted,
)
from csulora.adapters.lora import Adapter, LoraModule
from csulora.errors import AmbiguousError, HostLimitError, InputError, OtherFamilyError
from csulora.models.names import WEIGHT, parse_expert, with_known_projection, without_wrappers
from csulora.models.resolver import Resolver
from csulora.subspace.expert_layout import ExpertLayout
from csulora.subspace.subspace import Subspace

Layout = Literal["per-expert", "fused"]
PER_EXPERT: Layout = "per-expert"
FUSED: Layout = "fused"
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class _Experts(NamedTuple):
    """The experts of one layer of a model."""

    number: int
    projections: frozenset[str]


@dataclass(frozen=True)
class _Model:
    """What a subspace file says of its model's experts, and what checkpoint and memory call them."""

    layout: ExpertLayout | None
    layers: Mapping[str, _Experts]  # by the name of the experts module on disk
    to_disk: Resolver
    to_memory: Mapping[str, str]

    @classmethod
    def of(cls, subspace: Subspace) -> Self:
        to_memory = {module: name for name, module in subspace.names.items()}
        layers: dict[str, _Experts] = {}
        for module in subspace:
            if of_expert := parse_expert(module):
                experts, expert, _ = of_expert
                number, projections = layers.get(experts, _Experts(0, frozenset()))
                projection = with_known_projection(module).rpartition(".")[2]
                layers[experts] = _Experts(max(number, expert + 1), projections | {projection})
        return cls(subspace.provenance.experts, layers, Resolver(subspace, names=subspace.names), to_memory)

    def on_disk(self, name: str) -> str:
        """Return what the checkpoint calls a module; names that differ by wrappers alone stay."""
        module = self.to_disk.name_of(name)
        return name if without_wrappers(module) == without_wrappers(name) else module

    def in_memory(self, name: str) -> str:
        """Return what transformers calls a module; names that differ by wrappers alone stay."""
        return with_known_projection(self.to_memory.get(self.to_disk.name_of(name), name))

    def experts(self, name: str) -> _Experts:
        """Return the experts of the layer of one of them."""
        found = parse_expert(self.to_disk.name_of(name))
        return self.layers.get(found[0] if found else "", _Experts(0, frozenset()))


def has_experts(adapter: Adapter) -> bool:
    """Whether an adapter updates experts, in whatever layout."""
    return any(map(parse_expert, adapter.modules))


def check_layout(layout: str | None) -> None:
    """Raise `InputError` unless it is a layout, or None."""
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; it must be {' or '.join(LAYOUTS)}, or None for that of the adapter")


def check_number(adapter: Adapter, subspace: Subspace) -> None:
    """Raise `InputError` if fused factors hold another number of experts than the subspace file.

    vLLM takes the number from the model, and would share the same factors out among other experts.

    Args:
        adapter: what `experts.decoded` returned.
        subspace: the subspace file of the model.
    """
    if not adapter.is_decoded:
        return
    model = _Model.of(subspace)
    held: dict[str, dict[int, str]] = {}
    for name in adapter.modules:
        if of_expert := parse_expert(name):
            experts, expert, _ = of_expert
            held.setdefault(experts, {})[expert] = name
    for experts, names in held.items():
        number = model.experts(names[0]).number
        if number not in (0, len(names)):
            raise InputError(
                f"{adapter.path}: {experts} has factors of {len(names)} experts under the configuration's rank, and "
                f"the subspace file has {number}; use the adapter with the model and the configuration that it was "
                "trained with"
            )


def check_none_is_left_out(adapter: Adapter, names: Iterable[str], subspace: Subspace) -> None:
    """Raise `RefusedError` if only some experts of a projection would be written as they came.

    Fused factors hold them all, and PEFT fuses others as it loads them: two experts of rank 4 in a model of four become
    four of rank 2, each with parts of both.

    Args:
        adapter: what `experts.decoded` returned.
        names: those of its modules that are to be written.
        subspace: the subspace file of the model.
    """
    layout = subspace.provenance.experts
    if layout is None or not (adapter.is_decoded or layout.per_expert):
        return
    model = _Model.of(subspace)
    held: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if of_expert := parse_expert(name):
            experts, _, projection = of_expert
            held.setdefault((experts, projection), []).append(name)
    for (experts, projection), found in held.items():
        number = model.experts(found[0]).number
        if number not in (0, len(found)):
            raise AmbiguousError(
                f"{adapter.path}: {projection} of {len(found)} of the {number} experts of {experts} would be written, "
                "and PEFT takes factors of some for factors of all; have zeros written for the others "
                f"(--layout {PER_EXPERT} or --layout {FUSED})"
            )


def in_layout(adapter: Adapter, subspace: Subspace, layout: Layout | None) -> Adapter:
    """Encode what `experts.decoded` returned.

    Args:
        adapter: the adapter; what it updates beside experts stays as it is.
        subspace: the subspace file of the model.
        layout: the layout of experts; None: that in which they came.

    Raises:
        RefusedError: no host reads the model's experts so.
    """
    if layout is None or not has_experts(adapter):
        return encoded(adapter, subspace.provenance.experts)
    model = _Model.of(subspace)
    return _per_expert(adapter, model) if layout == PER_EXPERT else _fused(adapter, model)


def _per_expert(adapter: Adapter, model: _Model) -> Adapter:
    """Return a pair of factors for each expert and projection, of one rank, under the names of the checkpoint.

    PEFT fuses such an adapter as it loads it, if experts and router have one rank and all projections are there. It
    drops those of some families, see `ExpertLayout.dropped_by_peft`.
    """
    if model.layout is None or not model.layout.is_read_per_expert:
        raise HostLimitError(
            f"{adapter.path}: csulora does not know a host that reads this model's experts one by one; keep them fused "
            f"(--layout {FUSED}), which PEFT reads"
        )
    parameters = adapter.config.get("target_parameters") or []
    matrices = {model.on_disk(name) for name in adapter.modules if is_targeted(f"{name}{WEIGHT}", parameters)}
    whole = _filled(adapter, model)
    rank = max(module.rank for name, module in whole.items() if parse_expert(name))
    modules: dict[str, LoraModule] = {}
    for name, module in whole.items():
        stored = model.on_disk(name)
        modules[stored] = module.padded(rank) if parse_expert(name) or stored in matrices else module
        if parse_expert(name):
            # A file cannot hold one tensor under the names of gate and up, which share it where nothing was changed.
            modules[stored] = replace(modules[stored], a=modules[stored].a.clone())
    # Names that the adapter has not, as the router's of Mixtral, are in none of its targets.
    added = {name for name in modules if parse_expert(name) or name in matrices or name not in adapter.modules}
    config, listed = adapter.config | {"target_parameters": []}, adapter.config.get("target_modules")
    if isinstance(listed, list):
        config["target_modules"] = sorted({*listed, *(name.rpartition(".")[2] for name in added)})
    is_partial = adapter.partial or not isinstance(listed, list)  # then all modules are named
    return replace(adapter, modules=modules, config=config, partial=is_partial, is_decoded=False)


def _fused(adapter: Adapter, model: _Model) -> Adapter:
    """Return one pair of factors for both parameters of each layer's experts, as PEFT writes them."""
    if model.layout is None:
        raise OtherFamilyError(
            f"{adapter.path}: the subspace file does not say how its model lays experts out; extract it again from the "
            "model's checkpoints"
        )
    for name in adapter.modules:
        if parse_expert(name) and model.to_disk.resolve(name) is None:
            raise OtherFamilyError(
                f"{adapter.path}: {name} is none of the model's experts, and fused factors hold them all"
            )
    modules = _filled(adapter, model)
    matrices = [name for name in adapter.config.get("target_parameters") or [] if not is_parameter_of_experts(name)]
    parameters: dict[str, None] = dict.fromkeys(matrices)
    for name in modules:
        if of_expert := parse_expert(name):
            experts, _, projection = of_expert
            has_gate = f"{experts}.0.{GATE}" in modules
            parameters[f"{experts}.{GATE_UP if has_gate and projection != DOWN else projection}"] = None
    config = adapter.config | {"target_parameters": list(parameters)}
    decoded = replace(adapter, modules=modules, config=config, partial=True, is_decoded=True)
    return encoded(decoded, model.layout)


def _filled(adapter: Adapter, model: _Model) -> dict[str, LoraModule]:
    """Return the modules, under their names in memory, with an update of zero for each that has none."""
    modules = {model.in_memory(name): module for name, module in adapter.modules.items()}
    return modules | dict(_zeros(modules, model))


def _zeros(modules: Mapping[str, LoraModule], model: _Model) -> Iterator[tuple[str, LoraModule]]:
    """Yield an update of zero for each projection of the experts of a layer that has none, if others have one."""
    samples: dict[str, str] = {}
    for name in modules:
        if of_expert := parse_expert(name):
            samples.setdefault(of_expert[0], name)
    for experts, name in samples.items():
        sample, of_down = modules[name], name.endswith(f".{DOWN}")
        number, projections = model.experts(name)
        for expert, projection in product(range(number), sorted(projections)):
            if (missing := f"{experts}.{expert}.{projection}") not in modules:
                rows, columns = sample.shape if of_down == (projection == DOWN) else reversed(sample.shape)
                yield missing, LoraModule(sample.b.new_zeros(rows, 1), sample.a.new_zeros(1, columns))
