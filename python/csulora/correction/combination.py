"""Several adapters applied at once, as one: harmless updates can add up to one that undoes the alignment."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from csulora.adapters.expert_encoding import check_number
from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter, LoraModule
from csulora.correction.copies import check_copies
from csulora.errors import InputError, check_type
from csulora.models.resolver import Resolver
from csulora.subspace.subspace import Subspace


def combine(adapters: Sequence[Adapter], subspace: Subspace, weights: Sequence[float] | None = None) -> Adapter:
    """Return the weighted sum of adapters, in factors: [w1 s1 B1, w2 s2 B2, ...] times [A1; A2; ...].

    Correct the sum with ``Policy.none()`` to measure its energies and its undo, and with a policy that has limits to
    have them applied to it.

    Args:
        adapters: adapters for the model of ``subspace``.
        subspace: tells which modules of theirs are the same; what it covers goes by its name there.
        weights: a factor for each adapter; 1 if absent.

    Returns:
        An adapter with float32 factors and scale 1, whose rank is the sum of the ranks.

    Raises:
        RefusedError: a copy of a base matrix in an adapter is not the aligned checkpoint's.
        InputError: no adapter, weights that do not fit, another number of experts than in ``subspace``, or updates of
            one module that differ in shape.

    >>> lora = csulora.load_adapter(adapter)
    >>> both = csulora.combine([lora, lora], csulora.Subspace.open(subspace), [1, 0.5])
    >>> both.modules["model.layers.0.self_attn.q_proj"].rank
    16
    """
    for adapter in adapters:
        check_type(adapter, Adapter, "an adapter")
    check_type(subspace, Subspace, "subspace")
    weights = [1.0] * len(adapters) if weights is None else weights
    if not adapters or len(weights) != len(adapters):
        raise InputError(f"{len(weights)} weights for {len(adapters)} adapters; give a weight for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights are {list(weights)}; they must be finite")
    terms: dict[str, list[LoraModule]] = {}
    resolver = Resolver(subspace, subspace.aliases, subspace.names)
    for adapter, weight in zip(adapters, weights, strict=True):
        check_copies(adapter, subspace)
        adapter = decoded(adapter, subspace.provenance.experts)
        check_number(adapter, subspace)
        for name, module in adapter.modules.items():
            found = resolver.resolve(name)
            target = found.module if found else name
            earlier = terms.setdefault(target, [])
            if earlier and earlier[0].shape != module.shape:
                raise InputError(
                    f"{adapter.path}: {name} updates a {list(module.shape)} matrix, and an adapter before it a "
                    f"{list(earlier[0].shape)} one; they are for different models"
                )
            b = module.b.float() * (weight * module.scale)
            earlier.append(LoraModule(b, module.a.float(), is_embedding=module.is_embedding))
    parts = [(adapter.sha256, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    return Adapter(
        modules={name: _concatenated(modules) for name, modules in sorted(terms.items())},
        config={},
        path=Path(" + ".join(_label(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True))),
        sha256=hashlib.sha256(repr(parts).encode()).hexdigest(),
    )


def _label(adapter: Adapter, weight: float) -> str:
    return adapter.path.name if weight == 1 else f"{weight:g} {adapter.path.name}"


def _concatenated(modules: Sequence[LoraModule]) -> LoraModule:
    b = torch.cat([module.b for module in modules], 1)  # (out, sum of ranks)
    a = torch.cat([module.a for module in modules], 0)
    return LoraModule(b, a, is_embedding=modules[0].is_embedding)
