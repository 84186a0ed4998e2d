"""An adapter's update, split by the core into its four parts, each still a pair of factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter
from csulora.correction.correct import cover
from csulora.correction.report import PARTS
from csulora.errors import InputError, RefusedError
from csulora.native import _core
from csulora.policy.policy import Policy
from csulora.subspace.scope import Pair, Scope
from csulora.subspace.subspace import Subspace


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one adapter in the coordinates of one pack.

    Attributes:
        name: the adapter's.
        targets: module in the model -> module in the pack, in the order of the tensors below.
        whole: per module, factors of the update itself: b (out, r) and a (r, in), float32.
        pairs: the four parts' factors side by side: b (out, 4 r) and a (4 r, in), float32.
        triples: the displacement's leading singular triples u (out, k), s (k) and v (in, k), float32.
        energies: (modules, 4) float32, relative energies of aligned, left, right, off; rows sum to 1.
        norms2: (modules) float32, |dW|^2.
        scopes: per module, the inputs on which a scoped policy acts; none for one that acts on all.
        strength: by which a policy multiplies the penalties of its directions, see `strengthened`.
        untouched: factors of the modules that the pack does not cover, if they are to be kept.
    """

    name: str
    targets: dict[str, str]
    whole: dict[str, Pair]
    pairs: dict[str, Pair]
    triples: dict[str, tuple[Tensor, Tensor, Tensor]]
    energies: Tensor
    norms2: Tensor
    scopes: dict[str, Scope] = field(default_factory=dict)
    strength: float = 1.0
    untouched: dict[str, Pair] = field(default_factory=dict)

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
        if not any(pack[target].rank for target in targets.values()):
            raise InputError(
                f"{adapter.path}: the pack has no direction of the alignment in any of the adapter's modules"
            )
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
        whole = pairs_of(adapter)
        return cls(
            adapter.path.resolve().name,
            targets,
            {name: whole[name] for name in targets},
            {
                name: (torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts]))
                for name, parts in pairs.items()
            },
            {
                name: (pack[target].u.float(), pack[target].s, pack[target].v.float())
                for name, target in targets.items()
            },
            energies,
            norms2,
            {name: scope for name, target in targets.items() if (scope := pack.scope(target))},
            untouched={name: pair for name, pair in whole.items() if name not in targets and uncovered == "keep"},
        )

    def mixed(self, gains: Tensor) -> dict[str, Pair]:
        """The parts times gains (modules, 4), added up: factors of rank 4 r."""
        return {
            name: (b * gain.repeat_interleave(a.shape[0] // len(PARTS)), a)
            for (name, (b, a)), gain in zip(self.pairs.items(), gains, strict=True)
        }

    def along(self, gains: Tensor) -> dict[str, Pair]:
        """The update times gains along its left and right leading singular directions, and what is restored.

        ``gains``: (modules, 2, directions), or (modules, 3, directions) with multiples of the singular triples.
        """
        found = {}
        for (name, (b, a)), (u, s, v), rows in zip(self.whole.items(), self.triples.values(), gains, strict=True):
            k = min(u.shape[1], rows.shape[1])
            left, right, *restored = rows[:, :k]
            b, a = _attenuate(b, u[:, :k], left), _attenuate(a.T, v[:, :k], right).T
            for multiples in restored:
                b, a = torch.cat([b, u[:, :k] * (s[:k] * multiples)], 1), torch.cat([a, v[:, :k].T])
            found[name] = b, a
        return found

    def within_scopes(self, wanted: Mapping[str, Pair]) -> dict[str, Pair]:
        """What a scoped policy makes of the update that asks for factors of X' in every module."""
        return {
            name: self.scopes[name].applied(self.whole[name], pair) if name in self.scopes else pair
            for name, pair in wanted.items()
        }

    def energy_along(self, directions: int) -> float:
        """The relative energy e along so many leading directions of every module, see `Policy.usual_energy`."""
        along = whole = 0.0
        for (b, a), (u, _, v) in zip(self.whole.values(), self.triples.values(), strict=True):
            written, read = u[:, :directions].T @ b, a @ v[:, :directions]
            along += float(_norm2(written, a) + _norm2(b, read)) / 2
            whole += float(_norm2(b, a))
        return min(1.0, along / whole)  # which rounding exceeds where the directions are the update's own

    def strengthened(self, directions: int, usual_energy: float) -> Update:
        """The same with the strength that `Policy.usual_energy` gives it."""
        ratio = self.energy_along(directions) / usual_energy
        return replace(self, strength=max(ratio**2, _core.LEAST_STRENGTH))

    def change2(self, corrected: Mapping[str, Pair]) -> Tensor:
        """|X - dW|^2 / |dW|^2 over all modules, for corrected factors of each."""
        parts = [_distance2(corrected[name], pair) for name, pair in self.whole.items()]
        return (torch.stack(parts).sum() / self.norms2.sum()).float()

    def to(self, device: torch.device) -> Update:
        """The same on another device."""

        def moved(pairs: dict[str, Pair]) -> dict[str, Pair]:
            return {name: (b.to(device), a.to(device)) for name, (b, a) in pairs.items()}

        triples = {name: (u.to(device), s.to(device), v.to(device)) for name, (u, s, v) in self.triples.items()}
        return replace(
            self,
            whole=moved(self.whole),
            pairs=moved(self.pairs),
            triples=triples,
            energies=self.energies.to(device),
            norms2=self.norms2.to(device),
            scopes={name: scope.to(device) for name, scope in self.scopes.items()},
            untouched=moved(self.untouched),
        )


def _correct(
    adapter: Adapter, targets: Mapping[str, str], subspaces: list[_core.Subspace], gains: _core.Parts
) -> list[_core.Correction]:
    modules = [adapter.modules[name] for name in targets]
    return _core.correct(
        [
            _core.CorrectionTask(
                _core.LoraPair(module.b.float(), module.a.float(), module.scale), subspace, gains, name
            )
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


def _norm2(b: Tensor, a: Tensor) -> Tensor:
    """|b a|^2, in float64 and without the product of b (m, r) and a (r, n)."""
    b, a = b.double(), a.double()
    return ((b.T @ b) * (a @ a.T)).sum()


def _distance2(one: Pair, other: Pair) -> Tensor:
    """|b a - b' a'|^2."""
    return _norm2(torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]]))


def _attenuate(factor: Tensor, basis: Tensor, gains: Tensor) -> Tensor:
    """Return (I - basis (1 - gains) basis^T) factor, for factor (m, r), basis (m, k) and gains (k)."""
    return factor - basis @ ((1 - gains)[:, None] * (basis.T @ factor))
