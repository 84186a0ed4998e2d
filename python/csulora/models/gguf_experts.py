"""Experts in GGUF files: tensors (E, out, in) that hold all of a layer's, one for each projection.

Some files keep gate and up in one tensor, ``ffn_gate_up_exps``, the gate's rows first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from csulora.errors import InputError
from csulora.models.experts import ExpertPart

MOST_EXPERTS = 4096  # of a layer; the largest published models have 512

_GATE_UP = "ffn_gate_up_exps"
_PROJECTIONS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    _GATE_UP: ("gate_proj", "up_proj"),
    "ffn_down_exps": ("down_proj",),
}
_TENSOR = re.compile(rf"blk\.(?P<layer>0|[1-9][0-9]{{0,3}})\.(?P<kind>{'|'.join(_PROJECTIONS)})")
_SCALES = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,3})\.ffn_down_exps\.scale")
_MODULE = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<owner>(?:.*\.)?experts)\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<projection>\w+)"
)


class Stack(NamedTuple):
    """Which projections of a layer's experts a tensor holds, one after the other."""

    owner: str  # the experts module
    projections: tuple[str, ...]

    def modules(self, expert: int) -> list[str]:
        """Return the modules of one expert, in the order of their rows."""
        return [f"{self.owner}.{expert}.{projection}" for projection in self.projections]


def stack(tensor: str, owner: str) -> Stack | None:
    """Return what a tensor holds, of a GGUF name less ``.weight``; None if it holds no experts.

    Args:
        tensor: the name.
        owner: the end of the experts modules' names, behind the layer's number; empty if the architecture has none.

    >>> stack("blk.2.ffn_down_exps", "mlp.experts").modules(3)
    ['model.layers.2.mlp.experts.3.down_proj']
    """
    found = _TENSOR.fullmatch(tensor) if owner else None
    return Stack(f"model.layers.{found['layer']}.{owner}", _PROJECTIONS[found["kind"]]) if found else None


def tensor_name(module: str, owner: str, *, fused: bool) -> str | None:
    """Return the tensor that holds a module, less ``.weight``; None if the module is no expert of the architecture.

    >>> tensor_name("model.layers.2.mlp.experts.3.up_proj", "mlp.experts", fused=True)
    'blk.2.ffn_gate_up_exps'
    """
    found = _MODULE.fullmatch(module)
    if found is None or found["owner"] != owner:
        return None
    kinds = [kind for kind, held in _PROJECTIONS.items() if found["projection"] in held]
    if not kinds:
        return None
    return f"blk.{found['layer']}.{_GATE_UP if fused and _GATE_UP in kinds else kinds[0]}"


def number(module: str) -> int:
    """Return which expert a module belongs to, for which `tensor_name` has an answer."""
    found = _MODULE.fullmatch(module)
    assert found is not None
    return int(found["expert"])


def multipliers(layer: int | str, owner: str, scales: torch.Tensor, where: str) -> dict[str, float]:
    """Return what the down projections of a layer's experts are multiplied by, by module.

    Args:
        layer: its number.
        owner: the end of the experts module's name.
        scales: one for each expert.
        where: what messages call the tensor of them.

    Raises:
        InputError: a scale is not finite.
    """
    if not scales.isfinite().all():
        raise InputError(f"{where} holds a scale that is no number; it is damaged, fetch it again")
    return {f"model.layers.{layer}.{owner}.{i}.down_proj": scale for i, scale in enumerate(scales.tolist())}


def layer_of_scales(tensor: str) -> str | None:
    """Return the layer of a tensor that multiplies what experts return; None if it is another."""
    found = _SCALES.fullmatch(tensor)
    return found["layer"] if found else None


def is_fused(tensors: Sequence[str]) -> bool:
    """Whether a file with these tensors keeps gate and up of experts in one."""
    return any(tensor.endswith(f".{_GATE_UP}.weight") for tensor in tensors)


def parts(tensor: str, held: Stack, shape: Sequence[int], where: str) -> Iterator[tuple[str, ExpertPart]]:
    """Yield the experts' projections that a tensor (E, out, in) holds, by module.

    Raises:
        InputError: gate and up do not have as many rows each, or there are more than `MOST_EXPERTS`.
    """
    experts, rows, columns = shape
    if experts > MOST_EXPERTS:
        raise InputError(f"{where}: {tensor} has {experts} experts; at most {MOST_EXPERTS} are possible")
    height, rest = divmod(rows, len(held.projections))
    if rest:
        raise InputError(f"{where}: {tensor} has {rows} rows; gate and up have as many each")
    for expert in range(experts):
        for i, module in enumerate(held.modules(expert)):
            selected = slice(i * height, (i + 1) * height)
            yield module, ExpertPart(tensor, expert, False, selected, (height, columns))
