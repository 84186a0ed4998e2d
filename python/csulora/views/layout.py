"""Where a module stands in the model, by its name: a table of layers and kinds of module.

A model has thousands of experts, whose projections are of a few kinds: ``experts.gate_proj`` of all layers and experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from csulora.models.names import parse_expert

# model.layers.3.self_attn.q_proj: the stack `model.layers.`, layer 3, kind self_attn.q_proj.
_LAYER = re.compile(r"(.*?\.)?(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_DIGITS = re.compile("[0-9]+")
_OF_EXPERTS = re.compile(r"(?:.*\.)?(experts\.[^.]+)", re.DOTALL)
_CELL_WIDTH = 40  # pixels


def place(module: str) -> tuple[tuple[str, int], str]:
    """Split a module's name into its layer (stack, number) and its kind; number -1 where it is in no layer.

    No two names have the same place.
    """
    found = _LAYER.fullmatch(module)
    return ((found[1] or "", int(found[2])), found[3]) if found else (("", -1), module)


def kind_of(module: str) -> str:
    """Return a module's kind: its name below the layer, without the number of its expert.

    >>> kind_of("model.layers.3.mlp.experts.12.gate_proj")
    'mlp.experts.gate_proj'
    """
    found = parse_expert(module)
    return place(f"{found[0]}.{found[2]}" if found else module)[1]


@dataclass(frozen=True)
class Column:
    """A kind of module: its whole name, and the last part of it where that says enough."""

    kind: str
    short: str


@dataclass(frozen=True)
class Row:
    """A layer: its label, and its module of each kind, or None."""

    label: str
    modules: tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """Modules in a table.

    Attributes:
        columns: kinds of module.
        rows: layers.
        one_stack: whether a layer's number alone names it.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    one_stack: bool

    @property
    def label_width(self) -> int:
        """Width of the longest row label, in pixels."""
        return min(max(_CELL_WIDTH, 7 * max((len(row.label) for row in self.rows), default=0)), 180)

    @property
    def width(self) -> int:
        """Least width at which every number is legible, in pixels."""
        return self.label_width + _CELL_WIDTH * len(self.columns)

    @classmethod
    def of(cls, modules: Iterable[str]) -> Self:
        """Arrange modules by layer and kind."""
        found = {place(module): module for module in modules}
        layers = sorted({layer for layer, _ in found})
        kinds = sorted({kind for _, kind in found}, key=by_number)
        one_stack = len({stack for stack, number in layers if number >= 0}) <= 1
        return cls(
            columns=tuple(columns(kinds)),
            rows=tuple(
                Row(_label(*layer, one_stack), tuple(found.get((layer, kind)) for kind in kinds)) for layer in layers
            ),
            one_stack=one_stack,
        )


def by_number(kind: str) -> tuple[str, str]:
    """Sort key of kinds: experts.9 before experts.10."""
    return _DIGITS.sub(lambda digits: digits[0].zfill(9), kind), kind


def columns(kinds: Iterable[str]) -> list[Column]:
    """Shorten the names of kinds as far as they stay apart; those of experts remain recognisable."""
    kinds = list(kinds)
    short = [_short(kind) for kind in kinds]
    uses = Counter(short)
    return [Column(kind, last if uses[last] == 1 else kind) for kind, last in zip(kinds, short, strict=True)]


def _short(kind: str) -> str:
    of_experts = _OF_EXPERTS.fullmatch(kind)
    return of_experts[1] if of_experts else kind.rpartition(".")[2]


def _label(stack: str, number: int, one_stack: bool) -> str:
    if number < 0:
        return "none"
    return str(number) if one_stack else f"{stack}{number}"
