"""Subspaces for controls: as many directions, which know less of the alignment, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter
from csulora.errors import InputError
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace


def random_subspaces(subspace: Subspace, seed: int) -> Subspace:
    """Return uniformly random directions, as many per module as ``subspace`` has, with its singular values."""
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


def other_layers(subspace: Subspace) -> Subspace:
    """Return ``subspace`` with the directions of every kind of module moved on by one layer.

    A kind is the last part of a module's name. The last layer's directions go to the first.

    Raises:
        InputError: modules of one kind differ in shape.
    """
    kinds: dict[str, list[str]] = {}
    for name in subspace:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    moved: dict[str, ModuleSubspace] = {}
    for kind, names in kinds.items():
        if len({subspace[name].shape for name in names}) > 1:
            raise InputError(
                f"{kind} modules differ in shape, so that directions of one fit no other; take another control"
            )
        ordered = sorted(names, key=_natural)
        moved |= {name: subspace[ordered[(at + 1) % len(ordered)]] for at, name in enumerate(ordered)}
    return Subspace(moved, subspace.provenance)


def truncated(subspace: Subspace, rank: int) -> Subspace:
    """Return ``subspace`` with the leading ``rank`` directions of every module, or as many as it has."""
    return Subspace(
        {
            name: _with(module, module.u[:, :rank], module.v[:, :rank], module.s[:rank])
            for name, module in subspace.items()
        },
        subspace.provenance,
    )


def own_subspaces(
    subspace: Subspace, adapter: Adapter, targets: Mapping[str, str], ranks: Mapping[str, int] | None = None
) -> Subspace:
    """Return ``subspace`` with the leading directions of an adapter's own update.

    Args:
        subspace: gives every module as many directions at most, and modules that the adapter does not update.
        adapter: the one whose update is decomposed.
        targets: module in the model -> module in the subspace file, as `csulora.correction.correct.cover` returns it.
        ranks: module in the subspace file -> most directions of it.
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


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
