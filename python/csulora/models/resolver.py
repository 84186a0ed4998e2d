"""One weight, many names: finds the known module that a host, an adapter or another checkpoint means.

Classes of `transformers` wrap the same language model differently. Gemma 3's checkpoint says
``language_model.model.layers``, an adapter of today ``model.language_model.layers``, and one that was trained through
the text-only class ``model.layers``. What is left without these wrappers is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from csulora.errors import AmbiguousError
from csulora.models.names import bare


class Resolved(NamedTuple):
    """A known module, and whether it was found under a further name of a tied weight."""

    module: str
    is_alias: bool


class Resolver:
    """Finds known modules by any spelling of their names.

    >>> resolver = Resolver(["language_model.model.layers.0.mlp.up_proj", "vision_tower.layers.0.mlp.up_proj"])
    >>> resolver.resolve("model.layers.0.mlp.up_proj")
    Resolved(module='language_model.model.layers.0.mlp.up_proj', is_alias=False)
    >>> resolver.resolve("model.layers.1.mlp.up_proj") is None
    True
    """

    def __init__(
        self,
        known: Iterable[str],
        aliases: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Know some modules, and further names of theirs, name -> module.

        A known module of such a name, under whatever wrappers, is a weight of its own; the further name is left out.

        Args:
            known: the modules.
            aliases: names of tied weights, which may be updated once under each name.
            names: what a host calls a module, which is one weight under one name, see `renamings`.
        """
        self._exact = {module: Resolved(module, False) for module in known}
        own = {bare(module) for module in self._exact} if names or aliases else set()
        for further, is_alias in ((names, False), (aliases, True)):
            for name, module in (further or {}).items():
                if bare(name) not in own:
                    self._exact.setdefault(name, Resolved(module, is_alias))

    @cached_property
    def _bare(self) -> dict[str, list[str]]:
        """Known names by what is left of them without wrappers; exact names are found without it."""
        spelled: dict[str, list[str]] = {}
        for name in self._exact:
            spelled.setdefault(bare(name), []).append(name)
        return spelled

    def resolve(self, name: str) -> Resolved | None:
        """Return the module that a name means: the one of that name, else the only one that differs by wrappers.

        Raises:
            RefusedError: several modules differ from it by wrappers alone.
        """
        if (exact := self._exact.get(name)) is not None:
            return exact
        spelled = self._bare.get(bare(name), [])
        if len({self._exact[other].module for other in spelled}) > 1:
            raise AmbiguousError(f"module {name} may be {' or '.join(sorted(spelled))}; name the one that is meant")
        return self._exact[spelled[0]] if spelled else None

    def name_of(self, name: str) -> str:
        """Return what a known module is called here; another one keeps its name."""
        found = self.resolve(name)
        return found.module if found else name
