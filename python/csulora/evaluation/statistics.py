"""Paired comparisons of two ways to answer the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Paired:
    """McNemar's exact test: of the prompts that two models handle differently, how many does the first handle well?

    Attributes:
        better: prompts that only the first handles well.
        worse: prompts that only the second does.
        count: all prompts.
        p: two-sided; the chance of so uneven a split of ``better + worse`` if both were equally good.
    """

    better: int
    worse: int
    count: int
    p: float

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Self:
        """Compare outcomes on the same prompts in the same order.

        >>> Paired.of([True] * 6 + [False], [False] * 6 + [False])
        Paired(better=6, worse=0, count=7, p=0.03125)
        """
        pairs = list(zip(first, second, strict=True))
        better = sum(one and not other for one, other in pairs)
        worse = sum(other and not one for one, other in pairs)
        uneven = better + worse
        tail = sum(math.comb(uneven, at) for at in range(min(better, worse) + 1))
        return cls(better, worse, len(pairs), min(1.0, 2 * tail / 2**uneven))

    @property
    def difference(self) -> float:
        """The first's share of prompts handled well, less the second's."""
        return (self.better - self.worse) / self.count
