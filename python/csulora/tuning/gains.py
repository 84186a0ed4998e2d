"""What is fitted: gains of an update's directions or components, as functions of unbounded parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from csulora.subspace.input_filter import Factors
from csulora.tuning.update import Update

START = 2.0  # sigmoid(2) = 0.88: near "keep", where the gradient does not vanish
_MULTIPLE = 0.25  # of the displacement, per unit of a parameter: steps of Adam are as large for all parameters


class Gains(Protocol):
    """Gains that depend on parameters, which start near 1."""

    def start(self) -> Tensor:
        """Return the parameters to start from."""
        ...

    def correct(self, parameters: Tensor, index: Tensor, update: Update) -> dict[str, Factors]:
        """Return the corrected factors of an update, whose modules have the rows ``index`` among all fitted ones."""
        ...


class PerDirection:
    """Two gains per leading singular direction of a module: of what is written along the left, read along the right.

    A direction that a module's subspace does not have is left out.

    >>> gains = PerDirection(modules=3, directions=2)
    >>> gains.gains(gains.start()).shape
    torch.Size([3, 2, 2])
    """

    def __init__(self, modules: int, directions: int) -> None:
        """Fit 2 x ``directions`` gains for each of ``modules`` modules."""
        self.shape = modules, 2, directions

    def start(self) -> Tensor:
        """Return the parameters (modules, 2, directions)."""
        return torch.full(self.shape, START)

    def correct(self, parameters: Tensor, index: Tensor, update: Update) -> dict[str, Factors]:
        """Return (I - U (1 - left) U^T) dW (I - V (1 - right) V^T) for every module."""
        return update.along(self.gains(parameters[index]))

    def gains(self, parameters: Tensor) -> Tensor:
        """Return the gains (modules, 2, directions)."""
        return torch.sigmoid(parameters)


class Reinforcing(PerDirection):
    """The same two gains, and a multiple of every singular triple of the displacement that is added to any update.

    What an adapter does to the alignment differs from adapter to adapter; what reinforces the alignment does not. The
    gains follow an update's ``penalty_scale``, as `Policy.reference_energy` says.
    """

    def __init__(self, modules: int, directions: int) -> None:
        """Fit 3 x ``directions`` numbers for each of ``modules`` modules."""
        self.shape = modules, 3, directions

    def start(self) -> Tensor:
        """Return the parameters (modules, 3, directions), with which nothing is reinforced."""
        parameters = super().start()
        parameters[:, 2] = 0
        return parameters

    def correct(self, parameters: Tensor, index: Tensor, update: Update) -> dict[str, Factors]:
        """Return (I - U (1 - left) U^T) dW (I - V (1 - right) V^T) + U (reinforced S) V^T for every module.

        Where the update has input filters, the correction acts only on the inputs that they select.
        """
        return update.filtered(update.along(self.gains(parameters[index], update.penalty_scale)))

    def gains(self, parameters: Tensor, penalty_scale: float = 1.0) -> Tensor:
        """Return the gains left and right, and the multiples (modules, 3, directions)."""
        kept = torch.sigmoid(parameters[:, :2] - math.log(penalty_scale))  # g / (g + (1 - g) penalty_scale)
        return torch.cat([kept, _MULTIPLE * parameters[:, 2:]], 1)


class PerComponent(ABC):
    """Gains (modules, 4) of the components aligned, left, right, off."""

    @abstractmethod
    def start(self) -> Tensor:
        """Return the parameters to start from."""

    @abstractmethod
    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4) for modules given by index and the energies (modules, 4) of their updates."""

    def correct(self, parameters: Tensor, index: Tensor, update: Update) -> dict[str, Factors]:
        """Return the sum of the components, each times its gain, for every module."""
        return update.mixed(self(parameters, index, update.energies))


class PerModule(PerComponent):
    """Four gains for every module, or one.

    >>> gains = PerModule(modules=3, components=1)
    >>> gains.gains(gains.start()).shape
    torch.Size([3, 4])
    """

    def __init__(self, modules: int, components: int = 4) -> None:
        """Fit ``components`` gains, 4 or 1, for each of ``modules`` modules."""
        self.shape = modules, components

    def start(self) -> Tensor:
        """Return the parameters (modules, components)."""
        return torch.full(self.shape, START)

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4); the energies do not matter."""
        return self.gains(parameters[index])

    def gains(self, parameters: Tensor) -> Tensor:
        """Return the gains (modules, 4)."""
        return torch.sigmoid(parameters).expand(-1, 4)
