"""An adapter's update, split by the core into its four parts, each still a pair of factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora.core import _core
from csulora.correction import cover
from csulora.errors import InputError, RefusedError
from csulora.formats import Adapter
from csulora.policy import Policy
from csulora.subspace import Subspace

PARTS = ("aligned", "left", "right", "off")

Pair = tuple[Tensor, Tensor]
"""Factors b (out, r) and a (r, in) of an update b a."""


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one adapter in the coordinates of one pack.

    Attributes:
        name: the adapter's.
        targets: module in the model -> module in the pack, in the order of the tensors below.
        pairs: per module, the four parts' factors side by side: b (out, 4 r) and a (4 r, in), float32.
        energies: (modules, 4) float32, relative energies of aligned, left, right, off; rows sum to 1.
        norms2: (modules) float32, |dW|^2.
    """

    name: str
    targets: dict[str, str]
    pairs: dict[str, Pair]
    energies: Tensor
    norms2: Tensor

    @classmethod
    def of(cls, adapter: Adapter, pack: Subspace, uncovered: str = "refuse") -> Update:
        """Split an adapter's update.

        Raises:
            RefusedError, InputError: the adapter does not fit the pack, or has an update that is not of a linear layer.
        """
        for name, module in adapter.modules.items():
            if module.is_embedding:
                raise RefusedError(f"{adapter.path}: {name} is an embedding; tune fits updates of linear layers")
        targets = cover(adapter, pack, Policy.none(uncovered=uncovered))
        subspaces = pack.to_core(targets.values())
        pairs: dict[str, list[Pair]] = {name: [] for name in targets}
        for part in range(len(PARTS)):
            gains = _core.Parts(*(float(part == other) for other in range(len(PARTS))))
            results = _correct(adapter, targets, subspaces, gains)
            for name, result in zip(targets, results, strict=True):
                pairs[name].append((result.pair.b, result.pair.a))
        energies = torch.tensor([[getattr(result.energies, part) for part in PARTS] for result in results])
        norms2 = torch.tensor([result.norm**2 for result in results])
        if not float(norms2.sum()) > 0:
            raise InputError(f"{adapter.path}: the adapter changes nothing; there is nothing to tune")
        return cls(
            adapter.path.resolve().name,
            targets,
            {
                name: (torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts]))
                for name, parts in pairs.items()
            },
            energies,
            norms2,
        )

    def change2(self, gains: Tensor) -> Tensor:
        """|X - dW|^2 / |dW|^2 over all modules, for gains (modules, 4)."""
        share = self.norms2 / self.norms2.sum()
        return (share[:, None] * (1 - gains) ** 2 * self.energies).sum()

    def weights(self, gains: Tensor) -> dict[str, Tensor]:
        """Per module, the factor of every column of b: gains (modules, 4) spread over the parts' ranks."""
        return {
            name: gain.repeat_interleave(a.shape[0] // len(PARTS))
            for (name, (_, a)), gain in zip(self.pairs.items(), gains, strict=True)
        }

    def to(self, device: torch.device) -> Update:
        """The same on another device."""
        pairs = {name: (b.to(device), a.to(device)) for name, (b, a) in self.pairs.items()}
        return Update(self.name, self.targets, pairs, self.energies.to(device), self.norms2.to(device))


def _correct(
    adapter: Adapter, targets: Mapping[str, str], subspaces: list[_core.Subspace], gains: _core.Parts
) -> list[_core.Correction]:
    modules = [adapter.modules[name] for name in targets]
    return _core.correct(
        [
            _core.CorrectionTask(_core.LoraPair(module.b, module.a, module.scale), subspace, gains, name)
            for name, module, subspace in zip(targets, modules, subspaces, strict=True)
        ],
        _core.CorrectionOptions(_core.RankRule.keep),
    )


def pairs_of(adapter: Adapter) -> dict[str, Pair]:
    """An adapter's factors as they are, float32, its scale in b."""
    return {
        name: (module.b.float() * module.scale, module.a.float())
        for name, module in adapter.modules.items()
        if not module.is_embedding
    }
