"""Experts in checkpoints: how a model family lays out the parameters that hold all experts of a layer."""

from __future__ import annotations

from csulora.models.checkpoint import Checkpoint
from csulora.models.names import is_expert
from csulora.subspace.expert_layout import ExpertLayout

# Model types whose adapters of single experts PEFT 0.21 fuses as it loads them.
_PER_EXPERT = frozenset(
    {
        *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
        *("longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
        *("qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open"),
    }
)

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
    model_type = str(checkpoint.config.get("model_type"))
    return _LAYOUTS.get(model_type, ExpertLayout(per_expert=model_type in _PER_EXPERT))
