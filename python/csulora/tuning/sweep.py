"""The policies that need no fit: presets, and plain scaling, which they must beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from csulora.correction.controls.baselines import scaling_policy
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from csulora.policy.provenance import PolicyProvenance

_PENALTIES = (1.0, 10.0, 100.0)
_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Candidate:
    """A policy with its names on the frontier, see `Point`."""

    family: str
    name: str
    policy: Policy


def untouched(rest: dict[str, Any]) -> Candidate:
    """Return the uncorrected adapter; ``rest`` are a policy's other fields."""
    return Candidate("none", "none", Policy.none(**rest))


def presets(rest: dict[str, Any]) -> list[Candidate]:
    """Return every candidate that needs no fit and corrects something.

    >>> [candidate.name for candidate in presets({})][:3]
    ['project', 'csulora 1', 'csulora 10']
    """
    found = [Candidate("project", "project", Policy.project(**rest))]
    for penalty in _PENALTIES:
        found.append(Candidate("csulora", f"csulora {penalty:g}", Policy.csulora(penalty, **rest)))
    for penalty in (*_PENALTIES, math.inf):
        found.append(Candidate("protect", f"protect {penalty:g}", Policy.protect(penalty, **rest)))
        found.append(Candidate("aligned-only", f"aligned {penalty:g}", Policy(penalty, 0.0, 0.0, **rest)))
    return found


def scalings(rest: dict[str, Any]) -> list[Candidate]:
    """Return the control that multiplies the whole update by a factor.

    >>> [candidate.name for candidate in scalings({})][:3]
    ['x0.1', 'x0.2', 'x0.3']
    """
    return [Candidate("scaling", f"x{factor}", scaling_policy(factor, **rest)) for factor in _SCALES]


def fitted(modules: Sequence[str], gains: Tensor, others: bool, rest: dict[str, Any]) -> Policy:
    """Return the policy with gains (modules, 4) of aligned, left, right and off.

    ``others``: the subspace file has more modules, which get the mean gains.

    >>> policy = fitted(["a", "b"], torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1]]), others=True, rest={})
    >>> policy.overrides[-1].match, policy.overrides[-1].gains
    ('*', (0.5, 0.5, 0.5, 1.0))
    """
    named = [(name, tuple(row)) for name, row in zip(modules, gains.tolist(), strict=True)]
    if others:
        named.append(("*", tuple(gains.mean(0).tolist())))
    return Policy.none(overrides=tuple(Override(name, gains=row) for name, row in named), **rest)


def fitted_along(ranks: Mapping[str, int], gains: Tensor, others: bool, rest: dict[str, Any]) -> Policy:
    """Return the policy with gains (modules, 2 or 3, directions), as `Update.along` takes them, as each module's rank.

    ``others``: the subspace file has more modules, which get the mean gains of all directions that there are, for each
    of theirs; nothing is reinforced there.

    >>> policy = fitted_along({"a": 1}, torch.full((1, 2, 3), 0.5), others=False, rest={})
    >>> policy.overrides[0].directions
    Directions(left=(0.5,), right=(0.5,), reinforced=())
    """
    named = [
        Override(name, directions=Directions(*(tuple(side[:rank]) for side in row)))
        for (name, rank), row in zip(ranks.items(), gains.tolist(), strict=True)
    ]
    if others:
        within = [row[:2, :rank] for rank, row in zip(ranks.values(), gains, strict=True)]
        left, right = torch.cat(within, 1).mean(1).tolist()
        named.append(Override("*", gains=(left * right, left, right, 1.0)))
    return Policy.none(overrides=tuple(named), **rest)


def pinned(policy: Policy, sha256: str, provenance: PolicyProvenance) -> Policy:
    """Return the policy as its file has it: for one subspace file alone, with what it was made from.

    >>> pinned(Policy.none(), "0" * 64, PolicyProvenance()).subspace_sha256 == "0" * 64
    True
    """
    return replace(policy, subspace_sha256=sha256, provenance=provenance)
