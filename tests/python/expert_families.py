"""Tiny mixture-of-experts models, whose experts transformers keeps in parameters with three dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

VOCABULARY, WIDTH, TOKENS = 64, 32, [1, 9, 17, 23, 40, 5]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class ExpertFamily:
    """A class of transformers, its configuration, and what its adapters target."""

    model: str
    config: Callable[[], Any]
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    experts: str = "mlp.experts"
    has_gate: bool = True
    per_expert: bool = True  # PEFT fuses adapters of single experts as it loads them
    all_linear: bool = True  # PEFT can run a model with all of it adapted

    @property
    def parameters(self) -> list[str]:
        return [f"{self.experts}.{'gate_up_proj' if self.has_gate else 'up_proj'}", f"{self.experts}.down_proj"]


def _config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**COMMON | settings)


_GATED_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SLIDING: dict[str, Any] = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def _qwen3() -> Any:
    return _config("Qwen3MoeConfig", intermediate_size=48, head_dim=8, norm_topk_prob=True, **EXPERTS)


def _mixtral() -> Any:
    return _config("MixtralConfig", intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)


def _gpt_oss() -> Any:
    return _config("GptOssConfig", intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **_SLIDING)


def _llama4() -> Any:
    attention = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 32, "head_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]}
    return _config("Llama4TextConfig", intermediate_size=24, intermediate_size_mlp=48, **attention, **experts)


def _deepseek() -> Any:
    experts = EXPERTS | {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return _config("DeepseekV3Config", intermediate_size=48, **_LATENT, **experts, **groups)


def _gemma4() -> Any:
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    return _config("Gemma4TextConfig", intermediate_size=48, global_head_dim=8, **_SLIDING, **inputs, **experts)


def _qwen3_next() -> Any:
    return _config(
        "Qwen3NextConfig", intermediate_size=48, shared_expert_intermediate_size=24, **_GATED_DELTA, **EXPERTS
    )


def _qwen35() -> Any:
    return _config("Qwen3_5MoeTextConfig", shared_expert_intermediate_size=24, **_GATED_DELTA, **EXPERTS)


def _glm4() -> Any:
    experts = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return _config("Glm4MoeConfig", intermediate_size=48, head_dim=8, first_k_dense_replace=1, **experts)


def _granite() -> Any:
    return _config("GraniteMoeConfig", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)


def _lfm2() -> Any:
    return _config(
        "Lfm2MoeConfig",
        intermediate_size=48,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        **EXPERTS,
    )


def _olmoe() -> Any:
    return _config("OlmoeConfig", intermediate_size=24, num_experts=4, num_experts_per_tok=2)


def _jamba() -> Any:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    mamba = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4}
    return _config("JambaConfig", intermediate_size=24, num_experts=4, num_experts_per_tok=2, **layers, **mamba)


def _nemotron() -> Any:
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    shapes = {"moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "head_dim": 8}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, "conv_kernel": 2}
    return _config("NemotronHConfig", intermediate_size=48, hybrid_override_pattern="E*", **experts, **shapes, **mamba)


def _qwen2() -> Any:
    return _config("Qwen2MoeConfig", intermediate_size=48, shared_expert_intermediate_size=24, **EXPERTS)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES: dict[str, ExpertFamily] = {
    "Qwen 3": ExpertFamily("Qwen3MoeForCausalLM", _qwen3),
    "Mixtral": ExpertFamily("MixtralForCausalLM", _mixtral, (*_ATTENTION, "w1", "w2", "w3")),
    "Qwen 3 Next": ExpertFamily("Qwen3NextForCausalLM", _qwen3_next),
    "Qwen 3.5": ExpertFamily("Qwen3_5MoeForCausalLM", _qwen35, per_expert=False),
    "DeepSeek 3": ExpertFamily("DeepseekV3ForCausalLM", _deepseek, ("q_b_proj", "gate_proj", "up_proj", "down_proj")),
    "gpt-oss": ExpertFamily("GptOssForCausalLM", _gpt_oss, per_expert=False),
    "Llama 4": ExpertFamily(
        "Llama4ForCausalLM", _llama4, experts="feed_forward.experts", per_expert=False, all_linear=False
    ),
    "Gemma 4": ExpertFamily("Gemma4ForCausalLM", _gemma4, experts="experts", per_expert=False),
    "GLM 4.5": ExpertFamily("Glm4MoeForCausalLM", _glm4),
    "Granite": ExpertFamily("GraniteMoeForCausalLM", _granite, experts="block_sparse_moe.experts", per_expert=False),
    "LFM 2": ExpertFamily("Lfm2MoeForCausalLM", _lfm2, experts="feed_forward.experts", per_expert=False),
    "OLMoE": ExpertFamily("OlmoeForCausalLM", _olmoe),
    "Jamba": ExpertFamily("JambaForCausalLM", _jamba, experts="feed_forward.experts", per_expert=False),
    "Nemotron H": ExpertFamily(
        "NemotronHForCausalLM", _nemotron, experts="mixer.experts", per_expert=False, has_gate=False
    ),
    "Qwen 2": ExpertFamily("Qwen2MoeForCausalLM", _qwen2, per_expert=False),
}
