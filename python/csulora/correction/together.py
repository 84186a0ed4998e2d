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

_MEASURING = Policy.none(keep_uncovered=("*",))


@dataclass(frozen=True)
class Undone:
    """What one adapter undoes of each module.

    Attributes:
        name: what messages call it.
        shares: share of the alignment, by the subspace file's name for the module; those of both names of a tied
            weight are added.
        alignments: square of each module's alignment in the subspace, which weighs it in a total.
    """

    name: str
    shares: Mapping[str, float]
    alignments: Mapping[str, float]

    @property
    def total(self) -> float:
        """Share of all its modules' alignment that it undoes."""
        return _total([self])

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
        alignments = {module: subspace[module].norm ** 2 for module in shares}
        return cls(name or adapter.path.name, shares, alignments)

    def times(self, weight: float) -> Undone:
        """Return what the adapter undoes at another scale."""
        return replace(self, shares={module: weight * share for module, share in self.shares.items()})


def limits_sums(policy: Policy) -> bool:
    """Whether a policy has a limit that holds for sums; that on annihilation does not."""
    return policy.max_undo is not None or policy.max_total_undo is not None


def check_together(members: Sequence[Undone], policy: Policy, *, any_of_them: bool = False) -> None:
    """Check adapters that are added up against a policy's limits on undo, of a module and of all modules.

    Args:
        members: the adapters, each at its scale.
        policy: has the limits.
        any_of_them: let no sum be beyond them, whichever of the adapters are in it, each at a scale from 0 to 1.

    Raises:
        UndoTogetherError: a sum undoes more than the policy allows.
    """
    if not members:
        return
    names = " + ".join(member.name for member in members)
    if policy.max_undo is not None:
        worst, undone = _worst(members, any_of_them)
        if undone > policy.max_undo:
            parts = ", ".join(f"{member.name} {member.shares.get(worst, 0.0):.3f}" for member in members)
            raise UndoTogetherError(
                f"{names}: undo {undone:.3f} of the alignment of {worst} together ({parts}); the policy allows "
                f"{policy.max_undo:g}; serve them apart, or at smaller scales"
            )
    if policy.max_total_undo is not None:
        # A sum of fewer may have fewer modules to share its undo among, so each counts by its own.
        total = sum(max(member.total, 0.0) for member in members) if any_of_them else _total(members)
        if total > policy.max_total_undo:
            parts = ", ".join(f"{member.name} {member.total:.3f}" for member in members)
            raise UndoTogetherError(
                f"{names}: undo {total:.3f} of the alignment of all modules together ({parts}); the policy allows "
                f"{policy.max_total_undo:g}; serve them apart, or at smaller scales"
            )


def _worst(members: Sequence[Undone], any_of_them: bool) -> tuple[str, float]:
    totals: dict[str, float] = {}
    for member in members:
        for module, share in member.shares.items():
            totals[module] = totals.get(module, 0.0) + (max(share, 0.0) if any_of_them else share)
    worst = max(totals, key=lambda module: totals[module])
    return worst, totals[worst]


def _total(members: Sequence[Undone]) -> float:
    alignments = {module: size for member in members for module, size in member.alignments.items()}
    undone = sum(share * alignments[module] for member in members for module, share in member.shares.items())
    alignment = sum(alignments.values())
    return undone / alignment if alignment else 0.0  # nothing to undo: alignment moved none of the modules
