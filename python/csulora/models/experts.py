"""Experts in checkpoints: how a model family lays out the parameters that hold all experts of a layer."""

from __future__ import annotations

from csulora.models.checkpoint import Checkpoint
from csulora.models.names import is_expert
from csulora.subspace.expert_layout import ExpertLayout

# Families whose experts modules are unlike all others in `transformers` 5: (E, out, in), gate before up.
_LAYOUTS = {
    "gpt_oss": ExpertLayout(interleaved=True),
    "llama4": ExpertLayout(exchanged=True),
    "llama4_text": ExpertLayout(exchanged=True),
}


def expert_layout(checkpoint: Checkpoint) -> ExpertLayout | None:
    """Return how the model's experts lie in `transformers`; None if it has none."""
    if not any(map(is_expert, checkpoint.weights)):
        return None
    return _LAYOUTS.get(str(checkpoint.config.get("model_type")), ExpertLayout())
