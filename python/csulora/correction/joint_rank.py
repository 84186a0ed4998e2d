"""The rank that gate and up of an expert have together, where one pair of factors holds both."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from csulora.adapters import experts
from csulora.adapters.expert_encoding import FUSED, Layout
from csulora.adapters.lora import Adapter
from csulora.models.names import parse_expert, projection_of
from csulora.native import _core
from csulora.subspace.subspace import Subspace

_NOTHING = _core.Penalties(0.0, 0.0, 0.0)


def is_written_fused(adapter: Adapter, layout: Layout | None) -> bool:
    """Whether gate and up of an expert will share factors."""
    return layout == FUSED or (layout is None and experts.is_fused(adapter))


def jointly_truncated(
    corrected: Mapping[str, _core.Correction],
    subspace: Subspace,
    covered: Mapping[str, str],
    rank: int,
) -> dict[str, _core.Correction]:
    """Return the corrections of gates and ups of experts with one A for both, of a rank, and what that changes.

    The best approximation of gate and up as one matrix takes the place of the best of each.

    Args:
        corrected: of all covered modules, by name.
        subspace: the subspaces of the model.
        covered: name in the adapter -> module in the subspace file.
        rank: that of gate and up together.
    """
    pairs = [pair for pair in _pairs(corrected) if sum(corrected[name].factors.a.shape[0] for name in pair) > rank]
    stacked = [_stacked(corrected[gate].factors, corrected[up].factors, label=gate) for gate, up in pairs]
    joint = _core.correct(stacked, _core.CorrectionOptions(_core.RankRule.fixed, rank))
    names = [name for pair in pairs for name in pair]
    halves = [
        _core.LoraFactors(half, both.factors.a) for both in joint for half in both.factors.b.contiguous().chunk(2)
    ]
    device = halves[0].b.device if halves else torch.device("cpu")
    known = subspace.to_core((covered[name] for name in names), device)
    before, after = (
        _core.correct([_core.CorrectionTask(*each, _NOTHING) for each in zip(updates, known, strict=True)])
        for updates in ([corrected[name].factors for name in names], halves)
    )
    return {
        name: _cut(corrected[name], factors, whole, kept)
        for name, factors, whole, kept in zip(names, halves, before, after, strict=True)
    }


def _pairs(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield gate and up of each expert that has both."""
    ups = {_place(name): name for name in modules if parse_expert(name)}
    for name in modules:
        owner, expert, projection = _place(name)
        if projection == experts.GATE and (up := ups.get((owner, expert, experts.UP))):
            yield name, up


def _place(name: str) -> tuple[str, int, str]:
    owner, expert, projection = parse_expert(name) or (name, -1, "")
    return owner, expert, projection_of(projection)


def _stacked(gate: _core.LoraFactors, up: _core.LoraFactors, label: str) -> _core.CorrectionTask:
    """Return gate and up as one matrix, gate above up, of which nothing is to be changed but its rank."""
    a = torch.cat([gate.a, up.a])
    b = gate.b.new_zeros(gate.b.shape[0] + up.b.shape[0], a.shape[0])
    b[: gate.b.shape[0], : gate.b.shape[1]] = gate.b
    b[gate.b.shape[0] :, gate.b.shape[1] :] = up.b
    none = b.new_zeros(0, dtype=torch.float32)
    empty = _core.Subspace(b.new_zeros(b.shape[0], 0), none, a.new_zeros(a.shape[1], 0))
    return _core.CorrectionTask(_core.LoraFactors(b, a), empty, _NOTHING, label)


def _cut(
    correction: _core.Correction, factors: _core.LoraFactors, before: _core.Correction, after: _core.Correction
) -> _core.Correction:
    """Return a correction whose factors were replaced by a projection of theirs: the energies of both add up."""
    kept = min(after.norm**2 / before.norm**2, 1.0) if before.norm else 1.0
    return _core.Correction(
        factors,
        correction.energies,
        correction.gains,
        correction.norm,
        correction.relative_change,
        correction.undo,
        after.undo,
        1 - (1 - correction.truncation_error) * kept,
    )
