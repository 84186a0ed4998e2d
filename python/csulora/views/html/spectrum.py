"""How alignment moved each weight matrix: the singular values of every displacement, and the noise edge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace
from csulora.views.html.charts import Axis, Frame, Tick, round_values
from csulora.views.layout import by_number, columns, kind_of, place

_FRAME = Frame(width=360, height=220, left=44, right=350, top=10, bottom=186)
_POINTS = 48  # of a line; more cannot be told apart
_NEAR = 100  # a noise edge this many times below the values is still drawn


@dataclass(frozen=True)
class Line:
    """One module's singular values; ``depth`` is its layer's place among all, in [0, 1]."""

    module: str
    points: str
    depth: float


@dataclass(frozen=True)
class Panel:
    """One kind of module: a line per layer, the place of the largest noise edge (None: far off), its figures."""

    kind: str
    short: str
    lines: tuple[Line, ...]
    edge: float | None
    is_noise: bool  # whether the noise edge lies above all values
    modules: int
    shapes: str
    ranks: tuple[int, int]
    largest: float
    smallest: float
    noise_edge: float
    above_noise: int
    captured_energy: float


@dataclass(frozen=True)
class Spectrum:
    """A panel per kind of module, all with the same axes."""

    panels: tuple[Panel, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    frame: Frame = _FRAME

    @classmethod
    def of(cls, subspace: Subspace) -> Self:
        """Draw a subspace file."""
        kinds: dict[str, dict[str, ModuleSubspace]] = defaultdict(dict)
        for name, module in subspace.items():
            kinds[kind_of(name)][name] = module
        x, y = _axes(list(subspace.values()))
        panels = [
            _panel(column.kind, column.short, kinds[column.kind], x, y)
            for column in columns(sorted(kinds, key=by_number))
        ]
        middle = round(x.high / 2)
        return cls(tuple(panels), x.ticks([1, middle, x.high]), y.ticks(round_values(y.low, y.high)))


def _axes(modules: Sequence[ModuleSubspace]) -> tuple[Axis, Axis]:
    values = [value for module in modules if module.rank for value in (float(module.s[0]), float(module.s[-1]))]
    low, high = min(values, default=1.0), max(values, default=1.0)
    edges = [module.certificate.noise_edge for module in modules]
    low = min([low, *(edge for edge in edges if low / _NEAR < edge)])
    rank = max(module.rank for module in modules)
    x = Axis(1, max(rank, 2), _FRAME.left, _FRAME.right)
    return x, Axis(low / 1.2, high * 1.2, _FRAME.bottom, _FRAME.top, logarithmic=True)


def _panel(kind: str, short: str, modules: Mapping[str, ModuleSubspace], x: Axis, y: Axis) -> Panel:
    kept = [module for module in modules.values() if module.rank]
    certificates = [module.certificate for module in modules.values()]
    edge = max(certificate.noise_edge for certificate in certificates)
    ranks = [module.rank for module in modules.values()]
    return Panel(
        kind,
        short,
        tuple(_lines(modules, x, y)),
        y.at(edge) if y.low < edge < y.high else None,
        is_noise=edge >= y.high,
        modules=len(modules),
        shapes=", ".join(sorted({" x ".join(map(str, module.shape)) for module in modules.values()})),
        ranks=(min(ranks), max(ranks)),
        largest=max((float(module.s[0]) for module in kept), default=0.0),
        smallest=min((float(module.s[-1]) for module in kept), default=0.0),
        noise_edge=edge,
        above_noise=min(certificate.above_noise for certificate in certificates),
        captured_energy=min(certificate.captured_energy for certificate in certificates),
    )


def _lines(modules: Mapping[str, ModuleSubspace], x: Axis, y: Axis) -> list[Line]:
    """Return a line per layer; of a layer's experts, that of the one which alignment moved most."""
    drawn: dict[tuple[str, int], str] = {}
    for name, module in modules.items():
        layer = place(name)[0]
        if layer not in drawn or module.norm > modules[drawn[layer]].norm:
            drawn[layer] = name
    ordered = [drawn[layer] for layer in sorted(drawn)]
    lines = []
    for position, name in enumerate(ordered):
        values = modules[name].s.tolist()
        step = max(len(values) / _POINTS, 1)
        shown = sorted(
            {min(int(i * step), len(values) - 1) for i in range(min(len(values), _POINTS))} | {len(values) - 1}
        )
        points = " ".join(f"{x.at(i + 1):g},{y.at(values[i]):g}" for i in shown if i >= 0)
        lines.append(Line(name, points, round(position / max(len(ordered) - 1, 1), 2)))
    return lines
