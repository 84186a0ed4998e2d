"""In which layout the served model reads updates of experts."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls

from csulora.adapters.expert_encoding import FUSED, PER_EXPERT, Layout
from csulora.errors import RefusedError


def layout_of(config: VllmConfig) -> Layout:
    """Return what the model's class says: vLLM asks it, too, when it makes the layers.

    Raises:
        RefusedError: the server reads the factors of experts in another way than these two.
    """
    if config.lora_config.enable_moe_shared_loras:
        raise RefusedError(
            "vLLM takes the factors of experts for shared ones under --enable-moe-shared-loras; serve without it"
        )
    return FUSED if getattr(get_model_cls(config.model_config), "is_3d_moe_weight", False) else PER_EXPERT
