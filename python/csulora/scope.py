"""The scope of a policy: the inputs of a module on which its correction acts.

Where a policy is scoped, an update dW for which it asks X' becomes, with the module's scope F = P Q^T (in, in),

    X = dW + (X' - dW) F,

so an input x with F x = 0 meets the update as it came. `csulora.tuning.inputs` says where F comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora.core import _core
from csulora.errors import InputError
from csulora.report import PARTS

Pair = tuple[Tensor, Tensor]
"""Factors b (out, r) and a (r, in) of an update b a."""


def distance2(one: Pair, other: Pair) -> Tensor:
    """|b a - b' a'|^2, in float64, because most of it cancels."""
    left, right = torch.cat([one[0], -other[0]], 1).double(), torch.cat([one[1], other[1]]).double()
    return ((left.T @ left) * (right @ right.T)).sum()


@dataclass(frozen=True, eq=False)
class Scope:
    """F = p q^T of one module."""

    p: Tensor  # (in, f) float32
    q: Tensor  # (in, f) float32

    def __post_init__(self) -> None:
        """Check shapes and types."""
        if self.p.dim() != 2 or self.p.shape != self.q.shape or {self.p.dtype, self.q.dtype} != {torch.float32}:
            described = (f"{list(factor.shape)} {factor.dtype}" for factor in (self.p, self.q))
            raise InputError("the scope's p is {} and its q {}; both must be (in, f) float32".format(*described))

    def to(self, device: torch.device) -> Scope:
        """The same on another device."""
        return Scope(self.p.to(device), self.q.to(device))

    def within(self, a: Tensor) -> Tensor:
        """Return a F, for a (r, in)."""
        return (a @ self.p) @ self.q.T

    def applied(self, whole: Pair, wanted: Pair) -> Pair:
        """Return factors of X for dW = ``whole`` and X' = ``wanted``; their ranks add up."""
        (b, a), (wanted_b, wanted_a) = whole, wanted
        return torch.cat([b, wanted_b], 1), torch.cat([a - self.within(a), self.within(wanted_a)])


def correct_scoped(
    tasks: Sequence[_core.CorrectionTask], scopes: Sequence[Scope | None], options: _core.CorrectionOptions
) -> list[_core.Correction]:
    """Correct as ``options`` say, each task's correction acting on its scope alone, or on every input without one.

    Everything is computed in float32 and rounded once, to the pair's types; gains are |X_c| / |dW_c|. `RankRule.keep`
    keeps the rank of a pair and what `Directions` restore; the exact rank is up to three times that.

    Raises:
        InputError: as `_core.correct` does.
    """
    wholes = [(task.pair.b.float() * task.pair.scale, task.pair.a.float()) for task in tasks]
    exact = _core.CorrectionOptions(_core.RankRule.exact, usual_energy=options.usual_energy)
    wanted = _core.correct(
        [_with_pair(task, whole, task.attenuation) for task, whole in zip(tasks, wholes, strict=True)], exact
    )
    pairs = [
        scope.applied(whole, (x.pair.b, x.pair.a)) if scope else (x.pair.b, x.pair.a)
        for scope, whole, x in zip(scopes, wholes, wanted, strict=True)
    ]
    ranks = [_rank(task, x, pair, options) for task, x, pair in zip(tasks, wanted, pairs, strict=True)]
    cut = _cut(tasks, pairs, ranks)
    return [
        _correction(task, whole, x, pair, final)
        for task, whole, x, pair, final in zip(tasks, wholes, wanted, pairs, cut, strict=True)
    ]


def _with_pair(
    task: _core.CorrectionTask, pair: Pair, attenuation: _core.Penalties | _core.Parts | _core.Directions
) -> _core.CorrectionTask:
    return _core.CorrectionTask(_core.LoraPair(*pair), task.subspace, attenuation, task.label)


def _rank(task: _core.CorrectionTask, wanted: _core.Correction, pair: Pair, options: _core.CorrectionOptions) -> int:
    """The rank that X is cut to."""
    exact = pair[1].shape[0]
    if options.rule == _core.RankRule.exact:
        return exact
    if options.rule == _core.RankRule.fixed:
        return min(options.rank, exact)
    along = isinstance(task.attenuation, _core.Directions)
    return int(wanted.pair.a.shape[0] if along else task.pair.a.shape[0])


def _cut(tasks: Sequence[_core.CorrectionTask], pairs: Sequence[Pair], ranks: Sequence[int]) -> list[_core.Correction]:
    """Each X cut to its rank, and measured."""
    everything = _core.Parts(1.0, 1.0, 1.0, 1.0)
    found: dict[int, _core.Correction] = {}
    for rank in set(ranks):
        chosen = [number for number, other in enumerate(ranks) if other == rank]
        options = _core.CorrectionOptions(_core.RankRule.fixed, rank)
        results = _core.correct([_with_pair(tasks[number], pairs[number], everything) for number in chosen], options)
        found |= dict(zip(chosen, results, strict=True))
    return [found[number] for number in range(len(tasks))]


def _correction(
    task: _core.CorrectionTask, whole: Pair, wanted: _core.Correction, pair: Pair, final: _core.Correction
) -> _core.Correction:
    return _core.Correction(
        pair=_core.LoraPair(
            _stored(final.pair.b, task.pair.b.dtype, task.label), _stored(final.pair.a, task.pair.a.dtype, task.label)
        ),
        energies=wanted.energies,
        gains=_gains(wanted, final),
        norm=wanted.norm,
        change=math.sqrt(max(0.0, float(distance2(pair, whole)))) / wanted.norm if wanted.norm else 0.0,
        undo=wanted.undo,
        lost=final.lost,
    )


def _stored(factor: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    rounded = factor.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise InputError(
            f"{label}: the corrected update is too large for {dtype}; "
            "save the adapter as float32, or with smaller factors"
        )
    return rounded


def _gains(whole: _core.Correction, x: _core.Correction) -> _core.Parts:
    def gain(part: str) -> float:
        before = math.sqrt(getattr(whole.energies, part)) * whole.norm
        return math.sqrt(getattr(x.energies, part)) * x.norm / before if before else 1.0

    return _core.Parts(*map(gain, PARTS))
