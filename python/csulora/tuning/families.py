"""The families of fits: what each fits, in which directions, and the policy that follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from csulora.correction.controls.subspaces import own_subspaces, random_subspaces
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace
from csulora.tuning import sweep
from csulora.tuning.gains import PerDirection, PerModule, Reinforcing
from csulora.tuning.recommendation import EVERYWHERE, TUNED
from csulora.tuning.request import Request
from csulora.tuning.targets import Targets

Rows = Sequence[Sequence[float] | Sequence[Sequence[float]]]
"""Fitted gains of every module, as JSON holds them."""


class Family(ABC):
    """One family of fits for a request's adapters.

    Attributes:
        name: `Point.family` of its policies.
        is_control: whether it is no candidate but what candidates are compared with.
        carries_over: whether its policies follow each adapter's energy, and reinforce some of what alignment did.
        is_filtered: whether its policies act only on the inputs that input filters select.
    """

    name: ClassVar[str]
    is_control: ClassVar[bool] = False
    carries_over = False
    is_filtered = False

    def __init__(self, request: Request, targets: Targets) -> None:
        """Fit to some of the adapters of ``request``, whose modules are ``targets``."""
        self.request, self.targets = request, targets

    def subspace(self, number: int) -> Subspace:
        """Return the subspaces in which an adapter's gains are fitted, without this fit's input filters."""
        return self.request.subspace

    @property
    @abstractmethod
    def parametrization(self) -> PerDirection | PerModule:
        """The gains that are fitted, as a function of parameters."""

    @abstractmethod
    def policy(self, numbers: Sequence[int], rows: Rows, reference_energy: float | None) -> Policy:
        """Return the policy that a fit on some adapters leads to; ``rows`` are its gains of all modules."""

    def _fitted(self, numbers: Sequence[int], rows: Rows) -> tuple[list[str], Tensor, bool]:
        """The modules that a fit on some adapters covers, their gains, and whether the subspace file has others."""
        known = self.targets.updated(numbers)
        named = [(name, row) for name, row in zip(self.targets.modules, rows, strict=True) if name in known]
        modules = [name for name, _ in named]
        return modules, torch.tensor([row for _, row in named]), len(self.request.subspace) > len(modules)


class Tuned(Family):
    """Gains of single directions; for adapters to come, with what is reinforced and within input filters."""

    name = TUNED

    def __init__(self, request: Request, targets: Targets) -> None:
        """Fit what carries over to other adapters if the policy is for them."""
        super().__init__(request, targets)
        self.carries_over = request.is_for_others
        self.is_filtered = request.is_for_others and request.input_filters

    @property
    def parametrization(self) -> PerDirection:
        """Two gains per direction, and for adapters to come a multiple that is added."""
        options, modules = self.request.options, len(self.targets.modules)
        if self.carries_over:
            return Reinforcing(modules, options.shared_directions)
        return PerDirection(modules, options.directions)

    def rank(self, module: str) -> int:
        """Return how many directions of a module are fitted at most."""
        return self.request.subspace[module].rank

    def policy(self, numbers: Sequence[int], rows: Rows, reference_energy: float | None) -> Policy:
        """Return the policy with the gains of every direction that a module has."""
        modules, gains, others = self._fitted(numbers, rows)
        rest = self.request.policy_fields | {"reference_energy": reference_energy, "filtered": self.is_filtered}
        return sweep.fitted_along({name: self.rank(name) for name in modules}, gains, others, rest)


class TunedEverywhere(Tuned):
    """The same without input filters."""

    name = EVERYWHERE

    def __init__(self, request: Request, targets: Targets) -> None:
        """Act on all inputs."""
        super().__init__(request, targets)
        self.is_filtered = False


class TunedRandomSubspace(Tuned):
    """Control: the same in random directions."""

    name, is_control = "tuned random subspace", True

    @cached_property
    def _random(self) -> Subspace:
        return random_subspaces(self.request.subspace, self.request.options.seed)

    def subspace(self, number: int) -> Subspace:
        """Return random directions, the same for every adapter."""
        return self._random


class TunedOwnSubspace(Tuned):
    """Control: the same in the leading directions of each adapter's own update."""

    name, is_control = "tuned own subspace", True

    def subspace(self, number: int) -> Subspace:
        """Return the adapter's own directions, of each module no more than `rank`."""
        adapter, targets = self.request.adapters[number], self.targets.each[number]
        return own_subspaces(self.request.subspace, adapter, targets, self.targets.own_ranks)

    def rank(self, module: str) -> int:
        """Return how many directions all adapters have."""
        return min(super().rank(module), self.targets.own_ranks[module])


class TunedScaling(Family):
    """Control: one factor for each module's update."""

    name, is_control = "tuned scaling", True

    @property
    def parametrization(self) -> PerModule:
        """One factor per module."""
        return PerModule(len(self.targets.modules), components=1)

    def policy(self, numbers: Sequence[int], rows: Rows, reference_energy: float | None) -> Policy:
        """Return the policy with the gains of the four components."""
        return sweep.fitted(*self._fitted(numbers, rows), self.request.policy_fields)


CONTROLS: tuple[type[Family], ...] = (TunedScaling, TunedRandomSubspace, TunedOwnSubspace)


def candidates(request: Request) -> tuple[type[Family], ...]:
    """Return the families whose policies may be recommended."""
    if not request.is_for_others:
        return (Tuned,)
    return (Tuned, TunedEverywhere) if request.input_filters else (TunedEverywhere,)
