"""Why a subspace file does not cover a module: one sentence what it is, one what to do."""

from __future__ import annotations

import re

from csulora.adapters.lora import Adapter
from csulora.adapters.peft.config import base_model_name
from csulora.errors import RefusedError
from csulora.models.names import kind_of
from csulora.models.resolver import Resolver
from csulora.subspace.subspace import Subspace

# Parts of names beside the language model: without them a name may fit a layer that it does not mean.
_OTHER_MODEL = re.compile(
    r"vis(ion|ual)|vit|image|video|audio|speech|tower|coder|projector|connector|merger|mtp|draft|talker|expert"
)

_LAYER = re.compile(r"\.\d+\.")


def why_uncovered(adapter: Adapter, name: str, subspace: Subspace, resolver: Resolver) -> str:
    """Return why no module of the subspace file is meant by ``name``, and what to do."""
    if prefix := _impossible_prefix(adapter, name, subspace, resolver):
        return (
            f"module {name} has the prefix {prefix!r}, under which no class of this model keeps its layers; save the "
            "model that lies below it, or take the prefix out of all names"
        )
    is_known = any(_found(resolver, other) for other in adapter.modules)
    if not is_known and kind_of(name) == "linear":  # heads and embeddings are extracted where they are asked for
        return of_another_family(adapter)
    if _LAYER.search(name) and any(_found(resolver, other) for other in _in_other_layers(name)):
        return (
            f"the subspace file covers other layers, but not module {name}; if its model has no such layer, "
            f"{its_own_file(adapter)}, and otherwise extract all layers (--modules '*')"
        )
    return (
        f"the subspace file does not cover module {name}; extract it too (--modules '*' takes all), or name it in "
        "--drop-uncovered or --keep-uncovered"
    )


def of_another_family(adapter: Adapter) -> str:
    """Return what an adapter is of which the subspace file covers nothing, and what to do."""
    return (
        f"the subspace file covers none of the adapter's modules, such as {min(adapter.modules)}; it is of another "
        f"family, so {its_own_file(adapter)}"
    )


def its_own_file(adapter: Adapter) -> str:
    """Return what to do with an adapter for another model."""
    base = base_model_name(adapter.config.get("base_model_name_or_path"))
    return f"use the subspace file of {base or 'the model that it was trained on'}"


def _impossible_prefix(adapter: Adapter, name: str, subspace: Subspace, resolver: Resolver) -> str | None:
    """Return what precedes a name that the subspace file knows, if that cannot be a tower's."""
    for dot in re.finditer(r"\.", name):
        prefix, rest = name[: dot.end()], name[dot.end() :]
        module = _found(resolver, rest)
        if module and not _OTHER_MODEL.search(prefix) and subspace[module].shape == adapter.modules[name].shape:
            return prefix
    return None


def _in_other_layers(name: str) -> list[str]:
    """Return what a module is called in each of the first ten layers."""
    return [_LAYER.sub(f".{layer}.", name, count=1) for layer in range(10)]


def _found(resolver: Resolver, name: str) -> str | None:
    try:
        found = resolver.resolve(name)
    except RefusedError:  # several are meant
        return None
    return found.module if found else None
