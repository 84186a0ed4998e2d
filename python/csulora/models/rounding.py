"""How far storage may have moved the entries of a matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class RoundingVariances(NamedTuple):
    """Variances of a matrix's rounding errors, added up along each row and each column: the largest sums.

    ``margin`` is by how much the errors may spread further than ones that do not depend on each other.
    """

    row: float
    column: float
    margin: float = 1.0

    @property
    def transposed(self) -> RoundingVariances:
        """The same of the transposed matrix."""
        return RoundingVariances(self.column, self.row, self.margin)

    def scaled(self, factor: float) -> RoundingVariances:
        """The same of the matrix times a number."""
        return RoundingVariances(self.row * factor**2, self.column * factor**2, self.margin)

    @classmethod
    def stacked(cls, parts: Iterable[RoundingVariances | None]) -> RoundingVariances:
        """Bound the same of matrices below one another; None is one that was not rounded."""
        rounded = [part for part in parts if part]
        rows, columns, margins = zip(*rounded, strict=True)
        return cls(max(rows), sum(columns), max(margins))


def add_up(chunks: Iterable[np.ndarray], columns: int, margin: float = 1.0) -> RoundingVariances:
    """Add up the variances of a matrix's entries, given some of its rows at a time, (rows, columns) float64."""
    largest_row, sums = 0.0, np.zeros(columns)
    for variances in chunks:
        largest_row = max(largest_row, float(variances.sum(1).max()))
        sums += variances.sum(0)
    return RoundingVariances(largest_row, float(sums.max()), margin)
