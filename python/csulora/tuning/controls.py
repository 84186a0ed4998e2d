"""Controls: subspaces that know nothing of the alignment, with as many directions. Candidates must beat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter
from csulora.subspace.subspace import ModuleSubspace, Subspace


def random_subspaces(subspace: Subspace, seed: int) -> Subspace:
    """Return uniformly random directions, as many per module as ``subspace`` has."""
    generator = torch.Generator().manual_seed(seed)
    return Subspace(
        {
            name: _with(
                module, *(_orthonormal(torch.randn(side.shape, generator=generator)) for side in (module.u, module.v))
            )
            for name, module in subspace.items()
        },
        subspace.provenance,
    )


def own_subspaces(
    subspace: Subspace, adapter: Adapter, targets: Mapping[str, str], ranks: Mapping[str, int] | None = None
) -> Subspace:
    """Return ``subspace`` with the leading directions of an adapter's own update; ``targets`` as `Update` has them.

    ``ranks``: most directions of a module.
    """
    modules = dict(subspace)
    for name, target in targets.items():
        module = adapter.modules[name]
        left, right = torch.linalg.qr(module.b.float()), torch.linalg.qr(module.a.float().T)
        u, s, vt = torch.linalg.svd(left.R @ right.R.T)
        k = min(subspace[target].rank, len(s), (ranks or {}).get(target, len(s)))
        modules[target] = _with(subspace[target], left.Q @ u[:, :k], right.Q @ vt[:k].T, s[:k])
    return Subspace(modules, subspace.provenance)


def least_ranks(adapters: Sequence[Adapter], targets: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Return module -> how many directions of their own all adapters have that update it."""
    ranks: dict[str, int] = {}
    for adapter, names in zip(adapters, targets, strict=True):
        for name, target in names.items():
            module = adapter.modules[name]
            ranks[target] = min(module.rank, *module.shape, ranks.get(target, module.rank))
    return ranks


def _with(module: ModuleSubspace, u: Tensor, v: Tensor, s: Tensor | None = None) -> ModuleSubspace:
    return replace(module, u=u.contiguous(), v=v.contiguous(), s=module.s if s is None else s.contiguous())


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
