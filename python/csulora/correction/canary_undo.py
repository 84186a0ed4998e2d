"""Undo of a canary beside undo of the alignment: how much of its way to an un-aligned copy an update goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from csulora.adapters.lora import Adapter
from csulora.correction.correct import correct
from csulora.correction.report import ModuleReport
from csulora.errors import InputError
from csulora.models.resolver import Resolved, Resolver
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace


@dataclass(frozen=True)
class CanaryUndo:
    """Undo of a canary's D'' per module that the canary covers, before and after a correction.

    Attributes:
        subspace_sha256: of the canary's file.
        alignment_norm: module -> |S''|.
        undo: module -> -<dW, U S V^T> / |S|^2 with the canary's factors; ``undo_after``: of the corrected update.
    """

    subspace_sha256: str
    alignment_norm: Mapping[str, float]
    undo: Mapping[str, float]
    undo_after: Mapping[str, float]

    @classmethod
    def of(cls, adapter: Adapter, corrected: Adapter, canary: Subspace) -> CanaryUndo:
        """Measure an adapter before and after its correction.

        Raises:
            InputError: the subspace file is no canary, or does not fit the adapter.
            RefusedError: it has modules of other shapes than the adapter.
        """
        if canary.provenance.canary is None:
            raise InputError(f"{canary.path or 'the canary'}: is no canary; make one with `csulora canary`")
        before, after = (_measured(each, canary) for each in (adapter, corrected))
        # A module that was left out undoes nothing.
        undo_after = {found: module.undo or 0.0 for found, module in after.items()}
        return cls(
            canary.sha256,
            {module.module: module.alignment_norm or 0.0 for module in before.values()},
            {module.module: module.undo or 0.0 for module in before.values()},
            {module.module: undo_after.get(found, 0.0) for found, module in before.items()},
        )

    def total(self, modules: Iterable[str] | None = None) -> float:
        """Return the share of D'' that the updates of some modules cancel together, or those of all."""
        return self._total(self.undo, modules)

    def total_after(self, modules: Iterable[str] | None = None) -> float:
        """Return the same of the corrected updates."""
        return self._total(self.undo_after, modules)

    def _total(self, undo: Mapping[str, float], modules: Iterable[str] | None) -> float:
        names = [name for name in (self.undo if modules is None else modules) if name in self.undo]
        weight = sum(self.alignment_norm[name] ** 2 for name in names)
        return sum(undo[name] * self.alignment_norm[name] ** 2 for name in names) / weight if weight else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "subspace_sha256": self.subspace_sha256,
            "undo": self.total(),
            "undo_after": self.total_after(),
            "modules": {name: {"undo": undo, "undo_after": self.undo_after[name]} for name, undo in self.undo.items()},
        }


def _measured(adapter: Adapter, canary: Subspace) -> dict[Resolved | None, ModuleReport]:
    """Return what is known of modules by what their names mean: a correction may have given them those of today."""
    _, report = correct(adapter, canary, Policy.none(keep_uncovered=("*",)))
    resolver = Resolver(canary, canary.aliases, canary.names)
    return {resolver.resolve(module.module): module for module in report.measured}
