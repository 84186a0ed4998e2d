"""What llama.cpp must know of a model besides its weights, from the configuration of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig

Add = Callable[[GGUFWriter, PretrainedConfig], None]


def add_settings(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Write what every model has, and what this one has of its own."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(_first(config, "rms_norm_eps", "norm_eps", "layer_norm_epsilon"))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type not in ("jamba", "nemotron_h"):  # whose attention knows no positions
        writer.add_rope_freq_base(rotary(config)["rope_theta"])
    if config.model_type not in _OWN_HEADS:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * rotary(config).get("partial_rotary_factor", 1)))
    if add := _EXTRA.get(config.model_type):
        add(writer, config)


def rotary(config: PretrainedConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """The parameters of the rotary embedding in layers of one type."""
    parameters: dict[str, Any] = config.rope_parameters.get(layer_type, config.rope_parameters)
    if parameters["rope_type"] not in ("default", "proportional") and config.model_type != "ministral3":
        raise ValueError(f"rotary embeddings of type {parameters['rope_type']} are not supported")
    return parameters


def _sliding(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(rotary(config, "sliding_attention")["rope_theta"])


def _gemma2(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _sliding(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _granite(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _granite_moe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _granite(writer, config)
    _experts(writer, config)


def _ministral3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    parameters = rotary(config)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(parameters["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(parameters["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(parameters["mscale_all_dim"])
    writer.add_attn_temperature_scale(parameters["llama_4_scaling_beta"])


def _olmo3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _sliding(writer, config)
    writer.add_sliding_window_pattern(_where(config, "sliding_attention"))


def _qwen2_vl(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_rope_dimension_sections([*rotary(config)["mrope_section"], 0])


def _qwen3_vl(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _qwen2_vl(writer, config)
    writer.add_num_deepstack_layers(1)


def _qwen3_5(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_rope_dimension_sections([*rotary(config)["mrope_section"], 0])
    _gated_delta(writer, config)


def _gated_delta(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)


def _lfm2(writer: GGUFWriter, config: PretrainedConfig) -> None:
    is_conv = _where(config, "conv")
    writer.add_head_count_kv([0 if conv else config.num_key_value_heads for conv in is_conv])
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _gemma4(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _olmo3(writer, config)
    writer.add_head_count_kv([layer.num_key_value_heads for layer in config.per_layer_config])
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        _experts(writer, config)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    head, sliding = (
        config.per_layer_config[config.layer_types.index(kind)].head_dim
        for kind in ("full_attention", "sliding_attention")
    )
    for size, add in (
        (head, (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count)),
        (sliding, (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa)),
    ):
        for each in add:
            each(size)


def _falcon_h1(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_d_ssm)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_group_count(config.mamba_n_groups)


def _experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_count(_first(config, "num_experts", "num_local_experts", "n_routed_experts"))
    writer.add_expert_used_count(_first(config, "num_experts_per_tok", "top_k_experts"))
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)


def _sigmoid_experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _experts(writer, config)
    writer.add_leading_dense_block_count(_first(config, "first_k_dense_replace", "num_dense_layers"))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _glm4_moe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _sigmoid_experts(writer, config)
    writer.add_expert_shared_count(config.n_shared_experts)


def _lfm2_moe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _lfm2(writer, config)
    _sigmoid_experts(writer, config)


def _gpt_oss(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _experts(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _llama4(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _experts(writer, config)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)


def _nemotron_h(writer: GGUFWriter, config: PretrainedConfig) -> None:
    is_attention = _where(config, "full_attention")
    writer.add_head_count_kv([config.num_key_value_heads if attention else 0 for attention in is_attention])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.mamba_num_heads * config.mamba_head_dim)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_ssm_group_count(config.n_groups)
    _experts(writer, config)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)


def _feed_forward_length(config: PretrainedConfig) -> int | list[int]:
    if config.model_type == "nemotron_h":  # whose layers are of one kind each
        return [config.moe_intermediate_size if moe else 0 for moe in _where(config, "moe")]
    length: int = _first(config, "intermediate_size_mlp", "intermediate_size")
    return length


def _qwen3_next(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _gated_delta(writer, config)
    _experts(writer, config)


def _qwen3_5_moe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _qwen3_5(writer, config)
    _experts(writer, config)


def _jamba(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _experts(writer, config)
    writer.add_head_count_kv(
        [0 if kind == "mamba" else config.num_key_value_heads for kind in config.layers_block_type]
    )
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_dt_rank)


def _first(config: PretrainedConfig, *names: str) -> Any:
    """The value of the first of these settings that the model has."""
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _where(config: PretrainedConfig, layer_type: str) -> list[bool]:
    return [found == layer_type for found in _first(config, "layer_types", "layers_block_type")]


# Models whose layers differ in their heads.
_OWN_HEADS = frozenset({"nemotron_h", "lfm2", "lfm2_moe", "gemma4_text", "jamba"})
_EXTRA: dict[str, Add] = {
    "gemma2": _gemma2,
    "gemma3_text": _sliding,
    "granite": _granite,
    "granitemoe": _granite_moe,
    "ministral3": _ministral3,
    "olmo3": _olmo3,
    "qwen2_vl_text": _qwen2_vl,
    "qwen2_5_vl_text": _qwen2_vl,
    "qwen3_vl_text": _qwen3_vl,
    "qwen3_5_text": _qwen3_5,
    "mixtral": _experts,
    "qwen2_moe": _experts,
    "qwen3_moe": _experts,
    "olmoe": _experts,
    "qwen3_5_moe_text": _qwen3_5_moe,
    "qwen3_next": _qwen3_next,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "lfm2_moe": _lfm2_moe,
    "llama4_text": _llama4,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
    "lfm2": _lfm2,
    "falcon_h1": _falcon_h1,
    "gemma4_text": _gemma4,
}
