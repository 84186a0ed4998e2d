"""What is done to an adapter: the paper's policy over penalties and directions, other presets, and controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from protocol import Protocol

from csulora import Adapter, Policy, Subspace, controls
from csulora.correction.correct import cover
from csulora.policy.overrides import Override

_STRONG = 10.0  # penalty of the paper's policy in the controls


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy and the subspaces that it is used with.

    Attributes:
        name: in tables.
        control: whether it is what candidates are compared with.
    """

    name: str
    policy: Policy
    subspace: Subspace
    control: bool = False


def untuned(protocol: Protocol, adapter: Adapter, subspace: Subspace) -> Iterator[Candidate]:
    """Yield every candidate and control that needs no prompts."""
    for count in protocol.directions:
        known = controls.truncated(subspace, count)
        for penalty in protocol.penalties:
            yield Candidate(f"csulora {penalty:g}, k={count}", Policy.csulora(penalty), known)
        yield Candidate(f"project, k={count}", Policy.project(), known)
        yield Candidate(f"protect inf, k={count}", Policy.protect(math.inf), known)
        random = controls.random_subspaces(known, seed=count)
        for name, policy in (("csulora", Policy.csulora(_STRONG)), ("protect", Policy.protect(math.inf))):
            yield Candidate(f"random subspace: {name}, k={count}", policy, random, control=True)
    yield from _safe_lora(adapter, subspace)


def _safe_lora(adapter: Adapter, subspace: Subspace) -> Iterator[Candidate]:
    """Safe LoRA with its exact projection, of all modules and of the least similar half, as the policy that it is."""
    cosines = controls.cosines(adapter, subspace)
    targets = cover(adapter, subspace, Policy.none())
    half = sorted(cosines.values())[len(cosines) // 2]
    for name, threshold in (("all", math.inf), ("half", half)):
        projected = [targets[module] for module, cosine in cosines.items() if cosine < threshold]
        overrides = tuple(Override(module, gains=(1.0, 1.0, 0.0, 0.0)) for module in projected)
        policy = Policy.none(overrides=overrides)
        yield Candidate(f"Safe LoRA, {name}", policy, subspace, control=True)


def tuned(policy: Policy, subspace: Subspace) -> Candidate:
    """Return the policy that `tune` wrote, with the subspace file that it is for."""
    return Candidate("tuned", policy, subspace)
