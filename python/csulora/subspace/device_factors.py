"""Factors of a subspace file on a device: validated once, then kept there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from csulora.errors import InputError
from csulora.native import _core
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.module_subspace import ModuleSubspace

CPU = torch.device("cpu")


class DeviceFactors:
    """The factors of some modules as the compiled core takes them, per device."""

    def __init__(self, modules: Mapping[str, ModuleSubspace]) -> None:
        """Nothing is read yet."""
        self._modules = modules
        self._subspaces: dict[tuple[str, torch.device], _core.Subspace] = {}
        self._input_filters: dict[tuple[str, torch.device], InputFilter] = {}

    def subspaces(self, modules: Iterable[str], device: torch.device) -> list[_core.Subspace]:
        """Return u, s and v of some modules; the first call for a module and a device reads and validates them.

        Raises:
            InputError: they or a module's sketch are not finite, or they are not in order or not orthonormal.
        """
        modules = list(modules)
        fresh = {name: self._modules[name] for name in modules if (name, device) not in self._subspaces}
        subspaces = {
            name: _core.Subspace(*(factor.to(device) for factor in (module.u, module.s, module.v)))
            for name, module in fresh.items()
        }
        _core.validate(list(subspaces.items()))
        for name, module in fresh.items():
            if module.sketch is not None and not bool(module.sketch.isfinite().all()):
                raise InputError(f"{name}: the sketch holds NaN or infinity")
        self._subspaces |= {(name, device): subspace for name, subspace in subspaces.items()}
        return [self._subspaces[name, device] for name in modules]

    def input_filter(self, module: str, device: torch.device) -> InputFilter | None:
        """Return a module's input filter; None where corrections act on every input.

        Raises:
            InputError: its values are not finite.
        """
        input_filter = self._modules[module].input_filter
        if input_filter and (module, device) not in self._input_filters:
            if not bool(input_filter.p.isfinite().all() and input_filter.q.isfinite().all()):
                raise InputError(f"{module}: the input filter holds NaN or infinity")
            self._input_filters[module, device] = input_filter.to(device)
        return self._input_filters.get((module, device))

    def with_input_filters_of(self, modules: Mapping[str, ModuleSubspace]) -> DeviceFactors:
        """Return the factors of modules that differ from these in their input filters alone."""
        factors = DeviceFactors(modules)
        factors._subspaces = self._subspaces
        return factors
