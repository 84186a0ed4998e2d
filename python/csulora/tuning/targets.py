"""Which modules of the subspace file the adapters of a request update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from csulora.correction.controls.subspaces import least_ranks
from csulora.tuning.request import Request
from csulora.tuning.update import Update


@dataclass(frozen=True)
class Targets:
    """The modules of several adapters.

    Attributes:
        each: per adapter, module in the model -> module in the subspace file.
        modules: the subspace file's names of all of them, in the order of fitted gains.
        own_ranks: module -> how many directions of their own all adapters have that update it.
    """

    each: tuple[dict[str, str], ...]
    modules: tuple[str, ...]
    own_ranks: dict[str, int]

    @classmethod
    def of(cls, request: Request) -> Self:
        """Find the modules of a request's adapters.

        Raises:
            InputError, RefusedError: an adapter does not fit the subspace file.
        """
        each = tuple(Update.of(adapter, request.subspace, request.untuned).targets for adapter in request.adapters)
        every = {target for targets in each for target in targets.values()}
        # A policy's patterns match ends of names too, and the first counts: those that end others come after them.
        modules = tuple(sorted(every, key=lambda name: (-name.count("."), name)))
        return cls(each, modules, least_ranks(request.adapters, each))

    def updated(self, numbers: Iterable[int]) -> dict[str, str]:
        """Return module in the subspace file -> module in the model, for all modules that some adapters update."""
        return {target: name for number in numbers for name, target in self.each[number].items()}

    def rows(self, number: int) -> list[int]:
        """Return the positions in `modules` of an adapter's modules, in the adapter's order."""
        return [self.modules.index(target) for target in self.each[number].values()]
