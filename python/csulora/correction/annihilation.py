"""How much of a direction that a weight matrix writes an update removes.

The annihilation ratio of an update dW of the aligned W is min |u^T (W + dW)|^2 / |u^T W|^2, over all u in the column
space of dW. It is near 0 where the update removes a direction from what the matrix writes, as abliteration does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter, LoraModule
from csulora.correction.report import Report
from csulora.errors import InputError, RefusedError
from csulora.models.checkpoint import Checkpoint
from csulora.native import _core
from csulora.subspace.subspace import Subspace

_NEGLIGIBLE = 1e-7  # of the sum of singular values: what lies below is no direction of the update or of W


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


def annihilation_ratio(weight: Tensor, module: LoraModule) -> float:
    """Return the annihilation ratio of an update, in float64 and without the update's product.

    An update of nothing has the ratio 1, and so has one that only writes where the matrix writes nothing.

    Args:
        weight: W (out, in), of any floating type.
        module: factors b (out, r) and a (r, in) of the update.

    Raises:
        InputError: the shapes differ.

    >>> from csulora.adapters.lora import LoraModule
    >>> weight, u = torch.eye(3), torch.tensor([[1.0], [0.0], [0.0]])
    >>> annihilation_ratio(weight, LoraModule(-u, u.T @ weight))
    0.0
    >>> round(annihilation_ratio(weight, LoraModule(-u, 0.5 * u.T @ weight)), 6)
    0.25
    """
    if tuple(weight.shape) != tuple(module.shape):
        raise InputError(f"the update is of a {list(module.shape)} matrix, and the weight is {list(weight.shape)}")
    basis, update = _written(module)
    before = basis.T @ weight.to(basis)  # (r, in)
    # |u^T W| is the norm of u's coordinates along the left singular vectors, times the singular values.
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    kept = _notable(values)
    if not bool(kept.any()):
        return 1.0
    changed = right[kept] + (left[:, kept] / values[kept]).T @ update
    smallest = float(torch.linalg.svdvals(changed)[-1])
    return smallest * smallest


def with_annihilation(
    report: Report,
    adapter: Adapter,
    corrected: Mapping[str, _core.Correction],
    covered: Mapping[str, str],
    weights: AlignedWeights,
) -> Report:
    """Return the report with the annihilation ratios of all measured modules, before and after the correction.

    An embedding, which writes nothing but its own rows, has none.

    Raises:
        RefusedError: ``weights`` are not those that the subspace file was made from.
    """
    modules = []
    for each in report.modules:
        if each.module in covered and not adapter.modules[each.module].is_embedding:
            weight, factors = weights.load(covered[each.module]), corrected[each.module].factors
            before = annihilation_ratio(weight, adapter.modules[each.module])
            after = annihilation_ratio(weight, LoraModule(factors.b, factors.a))
            each = replace(each, annihilation_ratio=before, annihilation_ratio_after=after)
        modules.append(each)
    return replace(report, modules=tuple(modules), knows_annihilation=True)


def _written(module: LoraModule) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (out, r') of the update's column space, and the update in it (r', in), float64."""
    q_b, r_b = torch.linalg.qr(module.b.double() * module.scale)
    q_a, r_a = torch.linalg.qr(module.a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = _notable(values)
    return q_b @ left[:, kept], values[kept, None] * (right[kept] @ q_a.T)


def _notable(values: Tensor) -> Tensor:
    """Which of some singular values are more than rounding."""
    return values > _NEGLIGIBLE * values.sum()
