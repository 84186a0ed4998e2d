"""How gains are fitted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How gains are fitted.

    Attributes:
        steps: at most, for each of the adapters that one policy is fitted on.
        batch: prompts of each kind in a step.
        learning_rate: Adam's.
        directions: leading singular directions per module whose gains are fitted, where the pack has as many.
        shared_directions: the same of a policy for adapters to come, to whose rank each of them may add 1.
        keep: weight of the keep prompts' divergence, and of ordinary prompts', beside the guard prompts'.
        relative_change: weight of |X - dW|^2 / |dW|^2 beside the divergences, in nats per token.
        seed: of the order of the prompts.
    """

    steps: int = 100
    batch: int = 12
    learning_rate: float = 0.25
    directions: int = 64
    shared_directions: int = 16
    keep: float = 1.0
    relative_change: float = 0.05
    seed: int = 0
