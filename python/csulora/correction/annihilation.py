"""How much of a direction that a weight matrix writes an update removes.

The annihilation ratio of an update dW of the aligned W is min |u^T (W + dW)|^2 / |u^T W|^2, over all u in the column
space of dW. It is near 0 where the update removes a direction from what the matrix writes, as abliteration does.

It needs W, or a sketch of it: W G / sqrt(s) for Gaussian numbers G (n, s) that a seed determines. With the update's
sketch dW G / sqrt(s) the same minimum is an estimate. How far it may be off:

- Of one u, |x^T G|^2 is |x|^2 times a chi-squared number of s degrees of freedom. With Laurent and Massart's tail
  bounds (2000), the estimate exceeds the ratio by at most (1 + 2 c + 2 c^2) / (1 - 2 c), where c^2 = t / s and t is the
  logarithm of 1 / error probability. So an attacker gains nothing by a larger rank.
- Of all u together, the rows of u^T (W + dW) span at most as many dimensions as the update has columns, r, and so do
  those of u^T W. The singular values of an s x r Gaussian matrix over sqrt(s) lie within 1 -+ (sqrt(r / s) +
  sqrt(2 t / s)) (Davidson and Szarek 2001). So the estimate is at least the square of their quotient times the ratio.

Both hold for updates that were made without knowledge of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter, LoraModule
from csulora.correction.report import ModuleReport, Report
from csulora.errors import RefusedError
from csulora.models.checkpoint import Checkpoint
from csulora.native import _core
from csulora.subspace.subspace import Subspace

ERROR_PROBABILITY = 1e-3  # of an interval, for one module
_AT_ONCE = 8  # matrices of a checkpoint that are in memory


class Measured(NamedTuple):
    """The annihilation ratio of one update; the interval of the exact one, where this is an estimate."""

    ratio: float
    interval: tuple[float, float] | None = None


class Matrices(Protocol):
    """What knows the aligned matrices, wholly or in sketches."""

    def measure(self, updates: Sequence[tuple[str, LoraModule]]) -> Iterator[Measured | None]:
        """Yield the ratio of each update, given with the subspace file's name for its module; None: unknown."""


class AlignedWeights:
    """The matrices of the aligned checkpoint that a subspace file was made from."""

    def __init__(self, checkpoint: str | Path, subspace: Subspace) -> None:
        """Open the checkpoint; nothing is read of its matrices yet.

        Raises:
            InputError: it cannot be read.
        """
        self._checkpoint, self._subspace = Checkpoint.open(checkpoint), subspace

    def load(self, module: str) -> Tensor:
        """Return a matrix (out, in) by the subspace file's name for it.

        Raises:
            RefusedError: the checkpoint's is not the one that the subspace file was made from.
        """
        found = self._checkpoint.load(module) if module in self._checkpoint.weights else None
        if found is None or found[1] != self._subspace[module].aligned_sha256:
            raise RefusedError(
                f"{self._checkpoint.name}: {module} is not what the subspace file was made from; "
                "name the aligned checkpoint that `csulora extract` was given"
            )
        return found[0]

    def measure(self, updates: Sequence[tuple[str, LoraModule]]) -> Iterator[Measured]:
        """Yield the exact ratio of each update.

        Raises:
            RefusedError: the checkpoint's matrix is not the one that the subspace file was made from.
            InputError: an update's shape is not its matrix's, or values are not finite.
        """
        for first in range(0, len(updates), _AT_ONCE):
            some = updates[first : first + _AT_ONCE]
            weights = {name: self.load(name) for name in dict.fromkeys(name for name, _ in some)}
            tasks = [_core.AnnihilationTask(_factors(module), weights[name], name) for name, module in some]
            yield from (Measured(found.ratio) for found in _core.annihilations(tasks))


class Sketches:
    """The sketches of the aligned matrices in a subspace file."""

    def __init__(self, subspace: Subspace) -> None:
        """Take the sketches; `Subspace.is_sketched` says that there are some."""
        self._subspace, self._columns = subspace, subspace.sketch_columns
        self._seed = subspace.provenance.options["seed"]

    def measure(self, updates: Sequence[tuple[str, LoraModule]]) -> Iterator[Measured | None]:
        """Yield an estimate of each update's ratio; None where its rank is too large for the sketches.

        Raises:
            InputError: values are not finite.
        """
        # In float64: what is removed must not vanish beside columns that are large and cancel each other.
        rows = _core.sketches([module.a.cpu() for _, module in updates], self._columns, self._seed, torch.float64)
        tasks = {
            number: _core.AnnihilationTask(_factors(module, row), sketch, name)
            for number, ((name, module), row) in enumerate(zip(updates, rows, strict=True))
            if (sketch := self._subspace[name].sketch) is not None and factors_of_error(module.rank, self._columns)
        }
        found = dict(zip(tasks, _core.annihilations(list(tasks.values())), strict=True))
        for number in range(len(updates)):
            yield _with_interval(found[number], self._columns) if number in found else None


def factors_of_error(rank: int, columns: int) -> tuple[float, float] | None:
    """Return by what an estimate is multiplied for the ends of the exact ratio's interval; None: nothing bounds it.

    Args:
        rank: columns of the update.
        columns: of the sketch.

    >>> [round(factor, 2) for factor in factors_of_error(16, 512)]
    [0.55, 4.51]
    >>> factors_of_error(64, 128) is None
    True
    """
    t = math.log(4 / ERROR_PROBABILITY)
    c = math.sqrt(t / columns)
    spread = math.sqrt(rank / columns) + math.sqrt(2 * t / columns)
    if 2 * c >= 1 or spread >= 1:
        return None
    return (1 - 2 * c) / (1 + 2 * c + 2 * c * c), ((1 + spread) / (1 - spread)) ** 2


def annihilation_ratio(weight: Tensor, module: LoraModule) -> float:
    """Return the annihilation ratio of an update, in float64 and without the update's product.

    An update of nothing has the ratio 1, and so has one that only writes where the matrix writes nothing.

    Args:
        weight: W (out, in), float16, bfloat16 or float32, on the CPU.
        module: factors b (out, r) and a (r, in) of the update.

    Raises:
        InputError: the shapes differ, or values are not finite.

    >>> from csulora.adapters.lora import LoraModule
    >>> weight, u = torch.eye(3), torch.tensor([[1.0], [0.0], [0.0]])
    >>> annihilation_ratio(weight, LoraModule(-u, u.T @ weight))
    0.0
    >>> round(annihilation_ratio(weight, LoraModule(-u, 0.5 * u.T @ weight)), 6)
    0.25
    """
    return _core.annihilations([_core.AnnihilationTask(_factors(module), weight)])[0].ratio


def with_annihilation(
    report: Report,
    adapter: Adapter,
    corrected: Mapping[str, _core.Correction],
    covered: Mapping[str, str],
    matrices: Matrices,
) -> Report:
    """Return the report with the annihilation ratios of all measured modules, before and after the correction.

    An embedding, which writes nothing but its own rows, has none.

    Raises:
        RefusedError: the aligned checkpoint is not the one that the subspace file was made from.
        InputError: values are not finite.
    """
    names = [name for name in covered if not adapter.modules[name].is_embedding]
    updates = [(covered[name], adapter.modules[name]) for name in names]
    results = [(covered[name], _corrected(corrected[name].factors)) for name in names]
    # Side by side, so that a matrix is read once.
    found = list(matrices.measure([each for both in zip(updates, results, strict=True) for each in both]))
    ratios = dict(zip(names, zip(found[::2], found[1::2], strict=True), strict=True))
    unknown = tuple(name for name, (before, _) in ratios.items() if before is None)
    modules = tuple(_measured(each, *ratios.get(each.module, (None, None))) for each in report.modules)
    return replace(report, modules=modules, knows_annihilation=True, annihilation_unknown=unknown)


def _corrected(factors: _core.LoraFactors) -> LoraModule:
    return LoraModule(factors.b, factors.a)


def _measured(module: ModuleReport, before: Measured | None, after: Measured | None) -> ModuleReport:
    return replace(
        module,
        annihilation_ratio=before and before.ratio,
        annihilation_ratio_after=after and after.ratio,
        annihilation_interval=before and before.interval,
    )


def _factors(module: LoraModule, a: Tensor | None = None) -> _core.LoraFactors:
    return _core.LoraFactors(module.b.cpu(), module.a.cpu() if a is None else a, module.scale)


def _with_interval(found: _core.Annihilation, columns: int) -> Measured:
    ends = factors_of_error(found.rank, columns)
    assert ends is not None
    return Measured(found.ratio, (found.ratio * ends[0], found.ratio * ends[1]))
