"""Experts in checkpoints: where each one's projections lie in tensors that hold all experts of a layer.

Such a tensor is (E, out, in) or (E, in, out). Gate and up projections share one, ``gate_up_proj``: its outputs are
those of the gate and then those of up, or alternate. A model without gates has ``up_proj`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from csulora.models import renamings
from csulora.subspace.expert_layout import ExpertLayout

# Families whose experts modules are unlike all others in `transformers` 5: (E, out, in), gate before up.
_LAYOUTS = {
    "gpt_oss": ExpertLayout(interleaved=True),
    "llama4": ExpertLayout(exchanged=True),
    "llama4_text": ExpertLayout(exchanged=True),
}

# Checkpoints of these never held single experts, but vLLM reads factors of them, as gate_proj, up_proj and down_proj.
_STACKED_BUT_READ_SINGLY = frozenset({"granitemoe", "granitemoeshared", "granitemoehybrid"})

# The last part of a stacked tensor's name, without .weight -> which projections it holds, gate_up_proj or another.
_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"
_LEGACY = {"input_linear": _GATE_UP, "output_linear": _DOWN}  # Granite's, beside which no module is called experts


class ExpertPart(NamedTuple):
    """One projection of one expert, in a tensor of all of them."""

    tensor: str
    expert: int
    transposed: bool  # stored as (in, out)
    rows: slice  # of the expert's matrix, (out, in)
    shape: tuple[int, int]  # (out, in)


def layout_of(model_types: Sequence[str]) -> ExpertLayout:
    """Return how a model of these types, its own and that of its language model, lays experts out in memory."""
    known = next((_LAYOUTS[model_type] for model_type in model_types if model_type in _LAYOUTS), None)
    if known:
        return known
    fates = set(map(renamings.experts_of, model_types))
    elsewhere = "dropped" in fates or not _STACKED_BUT_READ_SINGLY.isdisjoint(model_types)
    return ExpertLayout(per_expert="converted" in fates, dropped_by_peft="converted" not in fates and elsewhere)


def parts(shapes: Mapping[str, Sequence[int]], layout: ExpertLayout) -> Iterator[tuple[str, ExpertPart]]:
    """Yield every expert's projections, by the name of a virtual module.

    Args:
        shapes: of all tensors, by name without ``.weight``. Those that hold no experts are passed over.
        layout: that of the model.

    >>> stored = {"mlp.experts.gate_up_proj": [2, 6, 4], "mlp.experts.down_proj": [2, 4, 3]}
    >>> name, part = next(parts(stored, ExpertLayout()))
    >>> name, part.shape, part.rows
    ('mlp.experts.0.gate_proj', (3, 4), slice(0, 3, None))
    """
    groups: dict[str, dict[str, str]] = {}
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        if last in _LEGACY and len(shape) == 3:
            groups.setdefault(f"{owner}.experts", {})[_LEGACY[last]] = name
        elif last in (_GATE_UP, _UP, _DOWN) and owner.endswith("experts") and len(shape) == 3:
            groups.setdefault(owner, {})[last] = name
    for owner, tensors in groups.items():
        yield from _of_module(owner, tensors, shapes, layout)


def _of_module(
    owner: str, tensors: Mapping[str, str], shapes: Mapping[str, Sequence[int]], layout: ExpertLayout
) -> Iterator[tuple[str, ExpertPart]]:
    up = tensors.get(_GATE_UP) or tensors.get(_UP)
    down = tensors.get(_DOWN)
    if up is None or down is None or len(tensors) != 2:
        return
    halves = 2 if _GATE_UP in tensors else 1
    (experts, a, b), (experts_too, c, d) = shapes[up], shapes[down]
    # Without a gate both may fit; then all families have (E, out, in).
    transposed = not (b == c and a == halves * d)
    width, hidden = (c, a) if transposed else (d, b)
    if experts != experts_too or (transposed and (a, b) != (d, halves * c)):
        return
    if halves == 1:
        rows = {_UP: slice(0, width)}
    elif layout.interleaved:
        rows = {"gate_proj": slice(0, None, 2), _UP: slice(1, None, 2)}
    else:
        rows = {"gate_proj": slice(0, width), _UP: slice(width, 2 * width)}
    for expert in range(experts):
        for projection, selected in rows.items():
            yield f"{owner}.{expert}.{projection}", ExpertPart(up, expert, transposed, selected, (width, hidden))
        whole = ExpertPart(down, expert, transposed, slice(0, hidden), (hidden, width))
        yield f"{owner}.{expert}.{_DOWN}", whole
