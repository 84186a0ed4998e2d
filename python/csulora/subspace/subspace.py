"""All subspaces of one model pair, in memory or mapped from a subspace file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from csulora.errors import InputError, OtherSubspaceError
from csulora.io.files import identity_of_file, sha256_of_file
from csulora.subspace import subspace_file
from csulora.subspace.device_factors import CPU, DeviceFactors
from csulora.subspace.input_filter import InputFilter
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance

if TYPE_CHECKING:
    from csulora.native import _core


class Subspace(Mapping[str, ModuleSubspace]):
    """All subspaces of a model pair: a mapping from module name to `ModuleSubspace`, with its provenance.

    >>> found = csulora.Subspace.open(subspace)
    >>> found["model.layers.0.self_attn.q_proj"].shape
    (128, 128)
    """

    obtained_by: ClassVar[str] = "csulora.Subspace.open(path)"

    def __init__(self, modules: Mapping[str, ModuleSubspace], provenance: Provenance) -> None:
        """Assemble what a subspace file holds, in memory."""
        self._modules = dict(sorted(modules.items()))
        self._factors = DeviceFactors(self._modules)
        self._source: tuple[Path, tuple[int, ...]] | None = None
        self.provenance = provenance

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> Self:
        """Map a subspace file and check its structure; factors are read, and checked by `to_core`, as they are needed.

        Args:
            path: the file.
            sha256: the one content, in hex, that is accepted; None: any.

        Raises:
            InputError: the file is not a subspace file, or its contents contradict each other.
            RefusedError: it is another subspace file than ``sha256`` says.
        """
        path = Path(path)
        identity = identity_of_file(path) if path.is_file() else ()
        subspace = cls(*subspace_file.read(path))
        subspace._source = path, identity
        if sha256 is not None and subspace.sha256 != sha256.strip().lower():
            raise OtherSubspaceError(
                f"{path}: has sha256 {subspace.sha256}, and {sha256} is asked for; it is another subspace file"
            )
        return subspace

    @property
    def path(self) -> Path | None:
        """The subspace file; None for one that was never read from a file."""
        return self._source[0] if self._source else None

    def save(self, path: str | Path) -> None:
        """Write the subspace file to ``path``, complete or not at all."""
        subspace_file.write(Path(path), self, self.provenance)

    def __getitem__(self, module: str) -> ModuleSubspace:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights: name in the model -> module in the subspace file."""
        return self.provenance.aliases

    @property
    def names(self) -> dict[str, str]:
        """What transformers calls some modules: its name -> module in the subspace file."""
        return self.provenance.names

    def to_core(self, modules: Iterable[str], device: torch.device = CPU) -> list[_core.Subspace]:
        """Return the factors of some modules as the compiled core takes them, on a device, where they then stay.

        Their values are validated when they are first asked for on the device, which costs one read of u and v.

        Raises:
            InputError: they are not finite, not in order or not orthonormal.
        """
        with self._naming_the_file():
            return self._factors.subspaces(modules, device)

    @property
    def is_filtered(self) -> bool:
        """Whether filtered policies can be used: there is an input filter for some module."""
        return any(module.input_filter for module in self.values())

    @property
    def sketch_columns(self) -> int:
        """Columns of the sketches of the aligned matrices; 0 without sketches."""
        return max((module.sketch.shape[1] for module in self.values() if module.sketch is not None), default=0)

    @property
    def is_sketched(self) -> bool:
        """Whether annihilation ratios can be estimated without the aligned checkpoint."""
        return self.sketch_columns > 0

    def input_filter(self, module: str, device: torch.device = CPU) -> InputFilter | None:
        """Return a module's input filter on a device, where it then stays; None where corrections act on every input.

        Raises:
            InputError: its values are not finite.
        """
        with self._naming_the_file():
            return self._factors.input_filter(module, device)

    def with_input_filters(self, input_filters: Mapping[str, InputFilter]) -> Subspace:
        """Return the same subspaces, whose modules have these input filters and no others."""
        modules = {name: replace(module, input_filter=input_filters.get(name)) for name, module in self.items()}
        subspace = Subspace(modules, self.provenance)
        subspace._factors = self._factors.with_input_filters_of(modules)
        return subspace

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Return one sha256 per checkpoint, over the names and content hashes of the extracted tensors."""
        return subspace_file.fingerprints(self)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the subspace file's bytes, or of those that `save` would write.

        Raises:
            InputError: the file is no longer the one that was opened.
        """
        if self._source is None:
            return subspace_file.sha256(self, self.provenance)
        path, identity = self._source
        digest = sha256_of_file(path)
        if identity_of_file(path) != identity:
            raise InputError(f"{path}: has changed since it was opened; open it again")
        return digest

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the factors, for JSON."""
        return subspace_file.document(self, self.provenance)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.path or 'subspace'}: {error}") from error
