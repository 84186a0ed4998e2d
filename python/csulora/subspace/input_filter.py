"""The input filter of a policy: the inputs of a module on which its correction acts.

Where a policy is filtered, an update dW for which it asks X' becomes, with the module's input filter
F = P Q^T (in, in),

    X = dW + (X' - dW) F,

so an input x with F x = 0 meets the update as it came. The compiled core corrects so; `csulora.tuning.inputs` says
where F comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csulora.errors import InputError
from csulora.native import _core

Factors = tuple[Tensor, Tensor]
"""Factors b (out, r) and a (r, in) of an update b a."""


@dataclass(frozen=True, eq=False)
class InputFilter:
    """F = p q^T of one module."""

    p: Tensor  # (in, f) float32
    q: Tensor  # (in, f) float32

    def __post_init__(self) -> None:
        """Check shapes and types."""
        if self.p.dim() != 2 or self.p.shape != self.q.shape or {self.p.dtype, self.q.dtype} != {torch.float32}:
            described = (f"{list(factor.shape)} {factor.dtype}" for factor in (self.p, self.q))
            raise InputError("the input filter's p is {} and its q {}; both must be (in, f) float32".format(*described))

    def to(self, device: torch.device) -> InputFilter:
        """The same on another device."""
        return InputFilter(self.p.to(device), self.q.to(device))

    def to_core(self) -> _core.InputFilter:
        """Return it as the compiled core takes it."""
        return _core.InputFilter(self.p, self.q)

    def within(self, a: Tensor) -> Tensor:
        """Return a F, for a (r, in)."""
        return (a @ self.p) @ self.q.T

    def applied(self, update: Factors, target: Factors) -> Factors:
        """Return factors of X for dW = ``update`` and X' = ``target``; their ranks add up."""
        (b, a), (target_b, target_a) = update, target
        return torch.cat([b, target_b], 1), torch.cat([a - self.within(a), self.within(target_a)])
