"""Modules of one shape: their factors lie side by side, so that many small products run as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from csulora.subspace.input_filter import Factors

Triple = tuple[Tensor, Tensor, Tensor]
"""Singular triples u (out, k), s (k) and v (in, k)."""

_TENSORS = ("b", "a", "u", "s", "v")


@dataclass(frozen=True, eq=False)
class Stack:
    """Modules of one shape, on one device.

    Attributes:
        names: of the modules.
        rows: their positions among all modules of the update.
        b: (modules, out, r) float32; with ``a`` (modules, r, in) the factors of their updates.
        u: (modules, out, k) float32; with ``s`` (modules, k) and ``v`` (modules, in, k) the displacement's triples.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    b: Tensor
    a: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, rows: Mapping[str, int], factors: Mapping[str, Factors], triples: Mapping[str, Triple]) -> Self:
        """Stack the modules whose positions are given."""
        kinds = zip(*((*factors[name], *triples[name]) for name in rows), strict=True)
        return cls(tuple(rows), tuple(rows.values()), *(torch.stack(kind) for kind in kinds))

    @property
    def factors(self) -> dict[str, Factors]:
        """Module -> b (out, r) and a (r, in)."""
        return dict(zip(self.names, zip(self.b, self.a, strict=True), strict=True))

    @property
    def triples(self) -> dict[str, Triple]:
        """Module -> its singular triples."""
        return dict(zip(self.names, zip(self.u, self.s, self.v, strict=True), strict=True))

    def to_devices(self, device_of: Callable[[str], torch.device]) -> list[Self]:
        """Return the same where ``device_of`` puts each module: one stack for each device."""
        found: dict[torch.device, list[int]] = {}
        for at, name in enumerate(self.names):
            found.setdefault(device_of(name), []).append(at)
        if len(found) == 1:
            return [replace(self, **{name: getattr(self, name).to(*found) for name in _TENSORS})]
        return [
            replace(
                self,
                names=tuple(self.names[at] for at in chosen),
                rows=tuple(self.rows[at] for at in chosen),
                **{name: getattr(self, name)[chosen].to(device) for name in _TENSORS},
            )
            for device, chosen in found.items()
        ]

    def along(self, gains: Tensor) -> dict[str, Factors]:
        """Return what `Update.along` says of these modules, for their gains (modules, 2 or 3, directions)."""
        k = min(self.u.shape[2], gains.shape[2])
        u, s, v = self.u[..., :k], self.s[:, :k], self.v[..., :k]
        left, right, *reinforced = gains[..., :k].to(self.b.device).unbind(1)
        written, read = (each[:, :k] for each in self._coefficients)
        b = self.b - u @ ((1 - left)[..., None] * written)
        a = self.a - ((1 - right)[..., None] * read).mT @ v.mT
        for multiples in reinforced:
            b, a = torch.cat([b, u * (s * multiples)[:, None]], 2), torch.cat([a, v.mT], 1)
        return dict(zip(self.names, zip(b.unbind(), a.unbind(), strict=True), strict=True))

    @cached_property
    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """U^T b and V^T a^T, (modules, k, r) each."""
        return self.u.mT @ self.b, self.v.mT @ self.a.mT

    def distance2(self, corrected: Mapping[str, Factors]) -> Tensor:
        """Return |X - dW|^2, a float64 scalar, for corrected factors of all of these modules."""
        b, a = (torch.stack([corrected[name][side] for name in self.names]) for side in range(2))
        return norm2(torch.cat([b, -self.b], 2), torch.cat([a, self.a], 1)).sum()


def norm2(b: Tensor, a: Tensor) -> Tensor:
    """Return |b a|^2 (...) for factors (..., m, r) and (..., r, n), in float64 and without their product."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))


def stacks(factors: Mapping[str, Factors], triples: Mapping[str, Triple], kinds: Mapping[str, Hashable]) -> list[Stack]:
    """Stack all modules of an update that have the same shape, and are of the same of some other ``kinds``."""
    found: dict[Hashable, dict[str, int]] = {}
    for row, name in enumerate(factors):
        shapes = (*(each.shape for each in factors[name]), triples[name][0].shape, kinds[name])
        found.setdefault(shapes, {})[name] = row
    return [Stack.of(rows, factors, triples) for rows in found.values()]
