"""Tiny models with experts, built by transformers itself; their routers and shared experts are linear modules."""

from typing import Any

import transformers

from language_families import GATED_DELTA, SLIDING, Family, configured

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _family(name: str, config: str | None = None, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", lambda: configured(f"{config or name}Config", **settings))


EXPERT_FAMILIES: dict[str, Family] = {
    "Mixtral": _family("Mixtral", **_LOCAL),
    "MiniMax M2": _family("MiniMaxM2", **_LOCAL, head_dim=8),
    "Phi MoE": _family("Phimoe", **_LOCAL),
    "gpt-oss": _family("GptOss", **_LOCAL, **SLIDING),
    "Granite MoE": _family("GraniteMoe", **_LOCAL),
    "OLMoE": _family("Olmoe", num_experts=4, num_experts_per_tok=2),
    "Qwen 3 MoE": _family("Qwen3Moe", **_EXPERTS, head_dim=8),
    "Qwen 3 Next": _family("Qwen3Next", **_EXPERTS, **GATED_DELTA, shared_expert_intermediate_size=24),
    "Qwen 3.5 MoE": _family("Qwen3_5Moe", "Qwen3_5MoeText", **_EXPERTS, **GATED_DELTA),
    "ERNIE 4.5 MoE": _family("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=24, head_dim=8),
    "DeepSeek-V3": _family("DeepseekV3", **_LATENT, **_ROUTED),
    "GLM-4 MoE": _family("Glm4Moe", **_ROUTED, head_dim=8),
    "LFM2 MoE": _family("Lfm2Moe", **_EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "Llama 4 text": Family(
        "Llama4ForCausalLM",
        lambda: transformers.Llama4TextConfig(
            **configured("LlamaConfig").to_dict()
            | {"num_local_experts": 4, "moe_layers": [1], "head_dim": 8, "intermediate_size_mlp": 48}
        ),
    ),
}
