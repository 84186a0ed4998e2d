"""Tiny configurations of every model family with a GGUF layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

_SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """How to make a model of one `model_type`, with an output head of its own unless transformers ties it."""

    name: str  # of the classes in transformers
    settings: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: _SEPARATE)
    config: str = ""  # of the config class, where it is not `name`
    gguf_name: str = ""  # where it is not `name` in lower case
    # Makes the configuration of a model that also sees of its language model's.
    wrap: Callable[[Any], Any] | None = None
    parameters: list[str] = field(default_factory=list)  # that adapters target beside modules: experts and routers

    @property
    def architecture(self) -> str:
        """What llama.cpp calls it."""
        return self.gguf_name or self.name.lower()


_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _gemma3(text: Any) -> Any:
    tokens: dict[str, Any] = {
        "mm_tokens_per_image": 4,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
    }
    return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=_TOWER, **tokens)


def _mistral3(text: Any) -> Any:
    tower = _TOWER | {"model_type": "pixtral", "head_dim": 16}
    return transformers.Mistral3Config(
        text_config=text.to_dict(), vision_config=tower, image_token_index=60, tie_word_embeddings=False
    )


_GEMMA4_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "temporal_patch_size": 1,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "tie_word_embeddings": False,
}


def _qwen3_vl(text: Any) -> Any:
    tower = _QWEN_TOWER | {"deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text.to_dict(), vision_config=tower, **_QWEN_TOKENS)


def _qwen2_5_vl(text: Any) -> Any:
    tower = _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=tower, **_QWEN_TOKENS)


def _qwen2_vl(text: Any) -> Any:
    tower = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return transformers.Qwen2VLConfig(text_config=text.to_dict(), vision_config=tower, **_QWEN_TOKENS)


def _qwen3_5(text: Any) -> Any:
    return transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=_QWEN_TOWER, **_QWEN_TOKENS)


def _llama4(text: Any) -> Any:
    tower = _TOWER | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    return transformers.Llama4Config(
        text_config=text.to_dict(),
        vision_config=tower | {"pixel_shuffle_ratio": 1.0},
        image_token_index=60,
        tie_word_embeddings=False,
    )


def _gemma4(text: Any) -> Any:
    return transformers.Gemma4Config(text_config=text.to_dict(), vision_config=_GEMMA4_TOWER, audio_config=None)


def _rotary(*sections: int, **settings: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)} | settings


# The epsilon of published models, which llama.cpp does not read: it takes 0.
_QWEN2_VL: dict[str, Any] = {"rope_parameters": _rotary(1, 1, 2), "rms_norm_eps": 1e-6}

# Two value heads for each key head.
_QWEN35: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 32,
    "rope_parameters": _rotary(2, 1, 1, partial_rotary_factor=0.25, mrope_interleaved=True),
    "layer_types": ["linear_attention", "full_attention"],
}
_LINEAR = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]
_GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,  # llama.cpp's default, which a file cannot turn off
}

_ATTENTION = _SEPARATE[:4]
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def _parameters(experts: str = "mlp.experts", router: str = "mlp.gate.weight") -> list[str]:
    return [f"{experts}.gate_up_proj", f"{experts}.down_proj", *([router] if router else [])]


_SHARED = {"shared_expert_intermediate_size": 24}
_GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_SHARED_NAMES = ["gate_proj", "up_proj", "down_proj", "shared_expert_gate"]
_SIGMOID: dict[str, Any] = {"routed_scaling_factor": 1.0, "norm_topk_prob": True}

_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.5,
    "attention_multiplier": 0.3,
    "tie_word_embeddings": False,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# The sizes of chunks and of the steps in which queries grow, which llama.cpp does not read.
_LLAMA4: dict[str, Any] = {
    "head_dim": 8,
    "intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

FAMILIES = {
    "llama": Family("Llama", {"tie_word_embeddings": False}),
    "mistral": Family("Mistral", {"head_dim": 16}, gguf_name="llama"),
    "mistral3": Family("Mistral3", {"head_dim": 16}, config="Mistral", gguf_name="mistral3", wrap=_mistral3),
    "ministral3": Family("Ministral3", {"head_dim": 16, "rope_parameters": _YARN}, gguf_name="mistral3"),
    "ministral3 (vision)": Family(
        "Mistral3",
        {"head_dim": 16, "rope_parameters": _YARN},
        config="Ministral3",
        gguf_name="mistral3",
        wrap=_mistral3,
    ),
    # Every fourth layer has no rotary embedding.
    "smollm3": Family("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "granite": Family("Granite", _GRANITE),
    "granitemoe": Family(
        "GraniteMoe",
        _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _ATTENTION,
        parameters=_parameters("block_sparse_moe.experts", "block_sparse_moe.router.weight"),
    ),
    "olmo2": Family("Olmo2"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "qwen2moe": Family(
        "Qwen2Moe",
        _EXPERTS | _SHARED | {"norm_topk_prob": False},
        [*_ATTENTION, *_SHARED_NAMES],
        parameters=_parameters(),
    ),
    "olmoe": Family(
        "Olmoe",
        _EXPERTS | {"norm_topk_prob": False, "num_key_value_heads": 4},  # llama.cpp wants as many as there are heads
        _ATTENTION,
        parameters=_parameters(),
    ),
    "qwen3moe": Family("Qwen3Moe", _EXPERTS | {"head_dim": 16}, _ATTENTION, parameters=_parameters()),
    "mixtral": Family(
        "Mixtral", {"num_local_experts": 4, "head_dim": 16}, _ATTENTION, gguf_name="llama", parameters=_parameters()
    ),
    # Every second layer has experts.
    "llama4": Family(
        "Llama4",
        _LLAMA4,
        [*_SEPARATE, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
        config="Llama4Text",
        parameters=_parameters("feed_forward.experts", "feed_forward.router.weight"),
    ),
    "llama4 (vision)": Family(
        "Llama4",
        _LLAMA4,
        config="Llama4Text",
        gguf_name="llama4",
        wrap=_llama4,
        parameters=_parameters("feed_forward.experts", "feed_forward.router.weight"),
    ),
    "qwen35moe": Family(
        "Qwen3_5Moe",
        _QWEN35 | _EXPERTS | _SHARED,
        [*_ATTENTION, *_SHARED_NAMES, *_LINEAR],
        config="Qwen3_5MoeText",
        gguf_name="qwen35moe",
        parameters=_parameters(),
    ),
    "qwen3next": Family(
        "Qwen3Next",
        _QWEN35
        | _EXPERTS
        | _SHARED
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        [*_ATTENTION, *_SHARED_NAMES, "in_proj_qkvz", "in_proj_ba", "out_proj"],
        parameters=_parameters(),
    ),
    "gpt-oss": Family(
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        _ATTENTION,
        gguf_name="gpt-oss",
        parameters=_parameters(router="mlp.router.weight"),
    ),
    "glm4moe": Family(
        "Glm4Moe",
        _SIGMOID
        | {
            **_GROUPED,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "use_qk_norm": True,
        },
        parameters=_parameters(),
    ),
    "lfm2moe": Family(
        "Lfm2Moe",
        _SIGMOID | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        ["q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"],
        parameters=_parameters("feed_forward.experts", "feed_forward.gate.weight"),
    ),
    "jamba": Family(
        "Jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        },
        [*_SEPARATE, "in_proj", "x_proj"],
        parameters=_parameters("feed_forward.experts", "feed_forward.router.weight"),
    ),
    "nemotron-h": Family(
        "NemotronH",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "moe_shared_expert_intermediate_size": 24,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "head_dim": 8,
            **_GROUPED,
        },
        [*_ATTENTION, "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"],
        gguf_name="nemotron_h_moe",
        parameters=["mixer.experts.up_proj", "mixer.experts.down_proj", "mixer.gate.weight"],
    ),
    "gemma4 (experts)": Family(
        "Gemma4",
        _GEMMA4
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
        | {"hidden_size_per_layer_input": 0},
        config="Gemma4Text",
        gguf_name="gemma4",
        parameters=_parameters("experts", "router.proj.weight"),
    ),
    "gemma": Family("Gemma", {"head_dim": 16}),
    "gemma2": Family("Gemma2", _GEMMA),
    # Every sixth layer attends to everything, with other rotary frequencies.
    "gemma3": Family("Gemma3", _GEMMA | {"num_hidden_layers": 6}, config="Gemma3Text"),
    "gemma3 (vision)": Family(
        "Gemma3", _GEMMA | {"num_hidden_layers": 6}, config="Gemma3Text", gguf_name="gemma3", wrap=_gemma3
    ),
    "phi3": Family("Phi3", targets=_FUSED),
    "qwen2vl": Family("Qwen2VL", _QWEN2_VL, config="Qwen2VLText", wrap=_qwen2_vl),
    "qwen2.5vl": Family(
        "Qwen2_5_VL",
        _QWEN2_VL,
        config="Qwen2_5_VLText",
        gguf_name="qwen2vl",
        wrap=_qwen2_5_vl,
    ),
    "qwen3vl": Family(
        "Qwen3VL",
        {"head_dim": 8, "rope_parameters": _rotary(2, 1, 1)},
        config="Qwen3VLText",
        wrap=_qwen3_vl,
    ),
    "qwen35": Family("Qwen3_5", _QWEN35, [*_SEPARATE, *_LINEAR], config="Qwen3_5Text", gguf_name="qwen35"),
    "qwen35 (vision)": Family(
        "Qwen3_5", _QWEN35, [*_SEPARATE, *_LINEAR], config="Qwen3_5Text", gguf_name="qwen35", wrap=_qwen3_5
    ),
    "gemma4": Family(
        "Gemma4", _GEMMA4, [*_SEPARATE, "per_layer_input_gate", "per_layer_projection"], config="Gemma4Text"
    ),
    # As the larger models are: without inputs per layer, and keys that are the values of layers with full attention.
    "gemma4 (vision)": Family(
        "Gemma4",
        _GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        config="Gemma4Text",
        gguf_name="gemma4",
        wrap=_gemma4,
    ),
    "glm4": Family("Glm4", {"head_dim": 16}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "lfm2": Family(
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ["q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"],
    ),
    "falcon-h1": Family(
        "FalconH1",
        {
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "attention_in_multiplier": 0.5,
            "attention_out_multiplier": 0.7,
            "key_multiplier": 1.5,
            "mlp_multipliers": [0.8, 0.6],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.9,
            "ssm_multipliers": [0.5, 0.75, 1.5, 1.25, 0.9],
            "lm_head_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "tie_word_embeddings": False,
        },
        targets=_SEPARATE,
        gguf_name="falcon-h1",
    ),
    "olmo3": Family("Olmo3", {"num_hidden_layers": 4, "sliding_window": 8}, gguf_name="olmo2"),
}
