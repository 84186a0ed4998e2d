"""The noise edge of pairs with a quantised matrix: the largest singular value that their rounding errors can have.

The core finds the edge of a pair of floating-point matrices itself. It is told of others by ``noise_std``.

Errors that do not depend on each other, of variances v_ij, have a norm of at most about

    max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij)    (Bandeira & van Handel 2016)

less that bound's small terms. Rounding to levels that are h apart has variance h^2 / 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from csulora.models.rounding import RoundingVariances


def noise_std(matrices: Sequence[torch.Tensor], quantised: Sequence[RoundingVariances | None]) -> float | None:
    """Return the standard deviation per entry of noise that spreads as far as the rounding of a difference may.

    Args:
        matrices: those that are subtracted, (m, n) each.
        quantised: for each matrix the variances of its quantisation; None if it is stored as floating point.

    Returns:
        A number for the core's ``noise_std``; None where no matrix is quantised.

    >>> matrix = torch.ones(4, 9)
    >>> noise_std([matrix, matrix], [None, None]) is None
    True
    >>> round(noise_std([matrix, matrix], [RoundingVariances(9.0, 4.0), None]), 6)
    1.0
    """
    if not any(quantised):
        return None
    # The errors of two files need not be independent, so their edges add up.
    edge = sum(
        floating_point_edge(matrix) if variances is None else quantised_edge(variances)
        for matrix, variances in zip(matrices, quantised, strict=True)
    )
    rows, columns = matrices[0].shape
    return edge / (math.sqrt(rows) + math.sqrt(columns))


def quantised_edge(variances: RoundingVariances) -> float:
    """Return the noise edge of one quantised matrix: the bound for independent errors, times the format's margin."""
    return variances.margin * _edge(variances)


def floating_point_edge(matrix: torch.Tensor) -> float:
    """Return the noise edge of one floating-point matrix, whose h is the spacing of its type around each entry."""
    precision = torch.finfo(matrix.dtype)
    _, exponents = torch.frexp(matrix.float())  # |entry| lies in [2^(exponent - 1), 2^exponent)
    smallest = math.frexp(precision.smallest_normal)[1]
    spacings = torch.exp2(exponents.clamp_(min=smallest) - 1.0).mul_(precision.eps)
    variances = spacings.square_().div_(12)
    row, column = (float(variances.sum(dim, dtype=torch.float64).max()) for dim in (1, 0))
    return _edge(RoundingVariances(row, column))


def _edge(variances: RoundingVariances) -> float:
    return math.sqrt(variances.row) + math.sqrt(variances.column)
