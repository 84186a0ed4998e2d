"""What is fitted: gains of every module's four parts, as functions of unbounded parameters."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

START = 2.0  # sigmoid(2) = 0.88: near "keep", where the gradient does not vanish


class Gains(Protocol):
    """Gains that depend on parameters, which start near 1."""

    def start(self) -> Tensor:
        """Return the parameters to start from."""
        ...

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4) for modules given by index and the energies (modules, 4) of their updates."""
        ...


class PerModule:
    """Four gains for every module, or one."""

    def __init__(self, modules: int, parts: int = 4) -> None:
        """Fit ``parts`` gains, 4 or 1, for each of ``modules`` modules."""
        self.shape = modules, parts

    def start(self) -> Tensor:
        """Return the parameters (modules, parts)."""
        return torch.full(self.shape, START)

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4); the energies do not matter."""
        return torch.sigmoid(parameters[index]).expand(-1, 4)
