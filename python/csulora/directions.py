"""Corrections in which every leading singular direction has a gain of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora.core import _core
from csulora.errors import InputError
from csulora.policy import Directions

_EVERYTHING = _core.Parts(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Task:
    """One module's update, its subspace, and how much of it is kept."""

    pair: _core.LoraPair
    subspace: _core.Subspace
    attenuation: _core.Penalties | _core.Parts | Directions
    label: str  # what error messages call it


@dataclass(frozen=True, eq=False)
class Correction:
    """What `_core.Correction` is for gains of parts; a part's gain is |X_c| / |dW_c|, 1 where dW_c is 0."""

    pair: _core.LoraPair
    energies: _core.Parts
    gains: _core.Parts
    norm: float
    change: float
    undo: float
    lost: float


def correct(tasks: Sequence[Task], options: _core.CorrectionOptions) -> list[_core.Correction | Correction]:
    """Correct every module; results are in the tasks' order.

    Raises:
        InputError: gains for more directions than the subspace has, or what the core refuses.
    """
    single = [isinstance(task.attenuation, Directions) for task in tasks]
    whole = iter(_core.correct([_core_task(task) for task, yes in zip(tasks, single, strict=True) if not yes], options))
    along = iter(_correct([task for task, yes in zip(tasks, single, strict=True) if yes], options))
    return [next(along) if yes else next(whole) for yes in single]


def _correct(tasks: Sequence[Task], options: _core.CorrectionOptions) -> list[Correction]:
    """X's rank is dW's and what is restored. The core measures both, and cuts X to another rank."""
    before = _core.correct([_core_task(task) for task in tasks], _core.CorrectionOptions(_core.RankRule.keep))
    attenuated = [_attenuated(task, restore=result.norm > 0) for task, result in zip(tasks, before, strict=True)]
    kept = [
        _core.CorrectionTask(_core.LoraPair(b.float(), a.float()), task.subspace, _EVERYTHING, task.label)
        for task, (b, a) in zip(tasks, attenuated, strict=True)
    ]
    after = _core.correct(kept, options)
    return [_correction(*each) for each in zip(tasks, before, attenuated, after, strict=True)]


def _core_task(task: Task) -> _core.CorrectionTask:
    attenuation = _EVERYTHING if isinstance(task.attenuation, Directions) else task.attenuation
    return _core.CorrectionTask(task.pair, task.subspace, attenuation, task.label)


def attenuate(factor: Tensor, basis: Tensor, gains: Tensor) -> Tensor:
    """Return (I - basis (1 - gains) basis^T) factor, for factor (m, r), basis (m, k) and gains (k)."""
    return factor - basis @ ((1 - gains)[:, None] * (basis.T @ factor))


def triples(u: Tensor, s: Tensor, v: Tensor, multiples: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (m, k) and (k, n) of the sum of singular triples u (m, k), s (k), v (n, k) times multiples (k)."""
    return u * (s * multiples), v.T


def _attenuated(task: Task, *, restore: bool) -> tuple[Tensor, Tensor]:
    """Return the factors of X in float64, dW's scale in b; nothing is restored where dW is 0."""
    sides = []
    assert isinstance(task.attenuation, Directions)
    b, a = task.pair.b.double() * task.pair.scale, task.pair.a.double().T
    for name, factor, basis in (("left", b, task.subspace.u), ("right", a, task.subspace.v)):
        gains = _numbers(task, name)
        sides.append(attenuate(factor, basis[:, : len(gains)].double(), gains))
    multiples = _numbers(task, "restored") * restore
    chosen = multiples.nonzero().flatten()
    u, s, v = (tensor[..., chosen].double() for tensor in (task.subspace.u, task.subspace.s, task.subspace.v))
    left, right = triples(u, s, v, multiples[chosen])
    return torch.cat([sides[0], left], 1), torch.cat([sides[1].T, right])


def _numbers(task: Task, name: str) -> Tensor:
    """Return what the policy says of every direction, for as many as it speaks of."""
    numbers = torch.tensor(getattr(task.attenuation, name), dtype=torch.float64, device=task.pair.b.device)
    known = len(task.subspace.s)
    if len(numbers) > known:
        raise InputError(
            f"{task.label}: the policy has numbers for {len(numbers)} {name} directions, and the pack has {known}; "
            "use the pack that the policy is for"
        )
    return numbers


def _correction(
    task: Task, before: _core.Correction, attenuated: tuple[Tensor, Tensor], after: _core.Correction
) -> Correction:
    assert isinstance(task.attenuation, Directions)
    b, a = attenuated
    difference = torch.cat([b, -task.pair.b.double() * task.pair.scale], 1), torch.cat([a, task.pair.a.double()])
    change = _norm(*difference) / before.norm if before.norm else 0.0
    most = math.inf if task.attenuation.restored else 1.0
    gains = [
        min(most, (kept * after.norm**2 / (energy * before.norm**2)) ** 0.5) if energy else 1.0
        for kept, energy in zip(_parts(after.energies), _parts(before.energies), strict=True)
    ]
    pair = _core.LoraPair(_stored(after.pair.b, task.pair.b, task), _stored(after.pair.a, task.pair.a, task))
    return Correction(pair, before.energies, _core.Parts(*gains), before.norm, change, before.undo, after.lost)


def _parts(parts: _core.Parts) -> tuple[float, float, float, float]:
    return parts.aligned, parts.left, parts.right, parts.off


def _norm(b: Tensor, a: Tensor) -> float:
    """|b a| for b (m, r) and a (r, n), in the factors' space."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _stored(factor: Tensor, replaced: Tensor, task: Task) -> Tensor:
    stored = factor.to(replaced.dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise InputError(
            f"{task.label}: the corrected update is too large for {replaced.dtype}; save the adapter as float32, or "
            "with smaller factors"
        )
    return stored
