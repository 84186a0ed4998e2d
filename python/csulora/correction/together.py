"""Adapters that a host adds up: each may be within a policy's limit, and their sum beyond it (arXiv 2603.12681).

The undo of a weighted sum of updates is the weighted sum of their undos, since it is linear in the update. So each
adapter is measured once, and any sum of them costs nothing. `csulora.combine` makes the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from csulora.adapters.lora import Adapter
from csulora.correction.correct import correct
from csulora.errors import UndoTogetherError
from csulora.models.resolver import Resolver
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace

_MEASURING = replace(Policy.none(), keep_uncovered=("*",))


@dataclass(frozen=True)
class Undone:
    """What one adapter undoes of each module.

    Attributes:
        name: what messages call it.
        shares: share of the alignment, by the subspace file's name for the module; those of both names of a tied
            weight are added.
    """

    name: str
    shares: Mapping[str, float]

    @classmethod
    def by(cls, adapter: Adapter, subspace: Subspace, name: str | None = None) -> Self:
        """Measure an adapter as it is, so a corrected one as it is served.

        Raises:
            CsuloraError: it does not fit the subspace file.
        """
        resolver = Resolver(subspace, subspace.aliases, subspace.names)
        shares: dict[str, float] = {}
        for module in correct(adapter, subspace, _MEASURING)[1].measured:
            found = resolver.resolve(module.module)
            assert found is not None
            assert module.undo is not None
            shares[found.module] = shares.get(found.module, 0.0) + module.undo
        return cls(name or adapter.path.name, shares)

    def times(self, weight: float) -> Undone:
        """Return what the adapter undoes at another scale."""
        return Undone(self.name, {module: weight * share for module, share in self.shares.items()})

    def at_most(self) -> Undone:
        """Return the most that it adds at any scale from 0 to 1."""
        return Undone(self.name, {module: max(share, 0.0) for module, share in self.shares.items()})


def check_together(members: Sequence[Undone], policy: Policy) -> None:
    """Raise `UndoTogetherError` if adapters that are added up undo more of a module than the policy's ``max_undo``."""
    if policy.max_undo is None or not members:
        return
    totals: dict[str, float] = {}
    for member in members:
        for module, share in member.shares.items():
            totals[module] = totals.get(module, 0.0) + share
    worst = max(totals, key=lambda module: totals[module])
    if totals[worst] > policy.max_undo:
        parts = ", ".join(f"{member.name} {member.shares.get(worst, 0.0):.3f}" for member in members)
        raise UndoTogetherError(
            f"{' + '.join(member.name for member in members)}: undo {totals[worst]:.3f} of the alignment of {worst} "
            f"together ({parts}); the policy allows {policy.max_undo:g}; serve them apart, or at smaller scales"
        )
