"""Ways to carry gains from the adapters they were fitted on to adapters never seen."""

from __future__ import annotations

import torch
from torch import Tensor

from csulora.tuning.gains import START, PerComponent


class Global(PerComponent):
    """Four gains for all modules together."""

    def start(self) -> Tensor:
        """Return the parameters (4)."""
        return torch.full((4,), START)

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4)."""
        return torch.sigmoid(parameters).expand(len(index), 4)


class Smooth(PerComponent):
    """Gains that add up, as logits, from the kind of module and a straight line over the layers."""

    def __init__(self, modules: list[str]) -> None:
        """Number the kinds of the modules, by their names in the subspace file, and the layers."""
        kinds = [name.rpartition(".")[2] for name in modules]
        known = sorted(set(kinds))
        layers = [next(int(part) for part in name.split(".") if part.isdecimal()) for name in modules]
        depth = torch.tensor(layers) / max(1, *layers)
        self.features = torch.cat([torch.eye(len(known))[[known.index(kind) for kind in kinds]], depth[:, None]], 1)

    def start(self) -> Tensor:
        """Return the parameters (kinds + 1, 4)."""
        parameters = torch.full((self.features.shape[1], 4), START)
        parameters[-1] = 0
        return parameters

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4)."""
        return torch.sigmoid(self.features[index] @ parameters)


class Penalties(PerComponent):
    """Penalties of every module's aligned, partial and off components: gains 1 / (1 + penalty x energy)."""

    def __init__(self, modules: int) -> None:
        """Fit three penalties for each of `modules` modules."""
        self.modules = modules

    def start(self) -> Tensor:
        """Return the parameters (modules, 3), logarithms of penalties."""
        return torch.zeros(self.modules, 3)

    def penalties(self, parameters: Tensor) -> Tensor:
        """Return the penalties (modules, 3)."""
        return parameters.exp()

    def __call__(self, parameters: Tensor, index: Tensor, energies: Tensor) -> Tensor:
        """Return gains (modules, 4)."""
        aligned, left, right, off = energies.unbind(1)
        merged = torch.stack([aligned, left + right, off], 1)
        return (1 / (1 + self.penalties(parameters)[index] * merged))[:, [0, 1, 1, 2]]
