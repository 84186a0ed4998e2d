"""How gains are fitted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How gains are fitted.

    Attributes:
        steps: for each of the adapters that one policy is fitted on.
        batch: prompts of each kind in a step.
        learning_rate: Adam's at the start; it falls to 0.
        directions: leading singular directions per module whose gains are fitted, where the subspace file has as many.
        shared_directions: the same of a policy for adapters to come, to whose rank each of them may add 1.
        task_weight: weight of the task prompts' divergence, and of general prompts', beside the safety prompts'.
        relative_change_weight: weight of |X - dW|^2 / |dW|^2 beside the divergences, in nats per token.
        unaligning_share: a fit for adapters to come has each adapter a second time, with this share of the displacement
            along the shared directions subtracted, see `csulora.tuning.unaligning`; 0: only as it is.
        seed: of the order of the prompts.

    >>> Options(steps=20).batch
    12
    """

    steps: int = 100
    batch: int = 12
    learning_rate: float = 0.25
    directions: int = 64
    shared_directions: int = 16
    task_weight: float = 1.0
    relative_change_weight: float = 0.05
    unaligning_share: float = 0.0
    seed: int = 0
