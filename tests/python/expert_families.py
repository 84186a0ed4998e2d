"""Tiny models with experts, built by transformers itself, which keeps them in parameters with three dimensions."""

from dataclasses import dataclass
from typing import Any

import transformers

from language_families import GATED_DELTA, SLIDING, Family, configured

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
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
_PER_LAYER: dict[str, Any] = {
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
_JAMBA_LAYERS: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
_JAMBA_MAMBA: dict[str, Any] = {
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
}
_NEMOTRON: dict[str, Any] = {
    "hybrid_override_pattern": "E*",
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 4,
    "conv_kernel": 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class ExpertFamily(Family):
    """A family whose adapters may target experts.

    Attributes:
        targets: the usual names of adapters of the family.
        experts: end of the names of its experts modules.
        has_gate: gate and up share a parameter; otherwise there is ``up_proj`` alone.
        per_expert: PEFT fuses adapters of single experts as it loads them.
        all_linear: PEFT can run a model with all of it adapted.
    """

    targets: tuple[str, ...] = _ATTENTION + _MLP
    experts: str = "mlp.experts"
    has_gate: bool = True
    per_expert: bool = True
    all_linear: bool = True

    @property
    def parameters(self) -> list[str]:
        """The parameters that hold the experts of a layer, in the model's order."""
        return [f"{self.experts}.{'gate_up_proj' if self.has_gate else 'up_proj'}", f"{self.experts}.down_proj"]


def _family(name: str, config: str | None = None, *, traits: dict[str, Any] | None = None, **settings: Any) -> Any:
    return ExpertFamily(f"{name}ForCausalLM", lambda: configured(f"{config or name}Config", **settings), **traits or {})


def _llama4() -> Any:
    settings = {"num_local_experts": 4, "moe_layers": [1], "head_dim": 8, "intermediate_size_mlp": 48}
    common = configured("LlamaConfig").to_dict()
    del common["model_type"]
    return transformers.Llama4TextConfig(**common | settings)


def _stacked(experts: str = "mlp.experts", **traits: Any) -> dict[str, Any]:
    return {"experts": experts, "per_expert": False, **traits}


EXPERT_FAMILIES: dict[str, ExpertFamily] = {
    "Mixtral": _family("Mixtral", **_LOCAL, traits={"targets": (*_ATTENTION, "w1", "w2", "w3")}),
    "MiniMax M2": _family("MiniMaxM2", **_LOCAL, head_dim=8, traits={"targets": (*_ATTENTION, "w1", "w2", "w3")}),
    "Phi MoE": _family("Phimoe", **_LOCAL, traits=_stacked(all_linear=False)),
    "gpt-oss": _family("GptOss", **_LOCAL, **SLIDING, traits=_stacked()),
    "Granite MoE": _family("GraniteMoe", **_LOCAL, traits=_stacked("block_sparse_moe.experts")),
    "OLMoE": _family("Olmoe", num_experts=4, num_experts_per_tok=2),
    "Qwen 2 MoE": _family("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=24, traits=_stacked()),
    "Qwen 3 MoE": _family("Qwen3Moe", **_EXPERTS, head_dim=8),
    "Qwen 3 Next": _family("Qwen3Next", **_EXPERTS, **GATED_DELTA, shared_expert_intermediate_size=24),
    "Qwen 3.5 MoE": _family(
        "Qwen3_5Moe",
        "Qwen3_5MoeText",
        **_EXPERTS,
        **GATED_DELTA,
        shared_expert_intermediate_size=24,
        traits=_stacked(),
    ),
    "ERNIE 4.5 MoE": _family("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=24, head_dim=8),
    "DeepSeek-V3": _family("DeepseekV3", **_LATENT, **_ROUTED, traits={"targets": ("q_b_proj", *_MLP)}),
    "GLM-4 MoE": _family("Glm4Moe", **_ROUTED, head_dim=8),
    "LFM2 MoE": _family(
        "Lfm2Moe",
        **_EXPERTS,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        traits=_stacked("feed_forward.experts"),
    ),
    "Jamba": _family(
        "Jamba",
        num_experts=4,
        num_experts_per_tok=2,
        **_JAMBA_LAYERS,
        **_JAMBA_MAMBA,
        traits=_stacked("feed_forward.experts"),
    ),
    "Nemotron-H": _family(
        "NemotronH", **_NEMOTRON, **_ROUTED | {"n_group": 1}, traits=_stacked("mixer.experts", has_gate=False)
    ),
    "Gemma 4 MoE": _family(
        "Gemma4",
        "Gemma4Text",
        **SLIDING,
        **_PER_LAYER,
        global_head_dim=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
        traits=_stacked("experts"),
    ),
    "Llama 4 text": ExpertFamily("Llama4ForCausalLM", _llama4, **_stacked("feed_forward.experts", all_linear=False)),
}
