"""Tiny models of families whose names on disk, in memory and in adapters differ, built by transformers itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

VOCABULARY, WIDTH, TOKENS = 64, 32, [1, 9, 17, 23, 40, 5]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING: dict[str, Any] = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
_GATED_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Family:
    """A class of transformers, its configuration, and the text-only class of the same checkpoint if there is one."""

    model: str
    config: Callable[[], Any]
    text_model: str | None = None


def _config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**_COMMON | settings)


def _rotary(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


def _gemma3() -> Any:
    text = _config("Gemma3TextConfig", **_SLIDING).to_dict()
    tokens: dict[str, Any] = {
        "mm_tokens_per_image": 4,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
    }
    return transformers.Gemma3Config(text_config=text, vision_config=_TOWER, **tokens)


def _mistral3() -> Any:
    tower = _TOWER | {"model_type": "pixtral", "head_dim": 16}
    text = _config("MistralConfig", head_dim=8).to_dict()
    return transformers.Mistral3Config(text_config=text, vision_config=tower, image_token_index=60)


def _llava() -> Any:
    tower = _TOWER | {"model_type": "clip_vision_model"}
    text = _config("LlamaConfig").to_dict()
    return transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=60)


def _qwen25() -> Any:
    text = _config("Qwen2_5_VLTextConfig", rope_parameters=_rotary(1, 1, 2)).to_dict()
    tower = _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _qwen3() -> Any:
    text = _config("Qwen3VLTextConfig", head_dim=8, rope_parameters=_rotary(2, 1, 1)).to_dict()
    tower = _QWEN_TOWER | {"num_position_embeddings": 16, "temporal_patch_size": 1, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _qwen35() -> Any:
    text = _config("Qwen3_5TextConfig", **_GATED_DELTA).to_dict()
    tower = _QWEN_TOWER | {"num_position_embeddings": 16, "temporal_patch_size": 1}
    return transformers.Qwen3_5Config(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _gemma3n() -> Any:
    layers = {"laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "intermediate_size": [48, 48]}
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    sparsity = {"activation_sparsity_pattern": [0.0, 0.0]}
    return _config("Gemma3nTextConfig", **_SLIDING, **layers, **inputs, **sparsity)


def _gemma4() -> Any:
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    return _config("Gemma4TextConfig", **_SLIDING, global_head_dim=8, **inputs)


FAMILIES: dict[str, Family] = {
    "Llama 3": Family("LlamaForCausalLM", lambda: _config("LlamaConfig", tie_word_embeddings=False)),
    "Qwen 2": Family("Qwen2ForCausalLM", lambda: _config("Qwen2Config")),
    "Qwen 3": Family("Qwen3ForCausalLM", lambda: _config("Qwen3Config", head_dim=8)),
    "Phi 3": Family("Phi3ForCausalLM", lambda: _config("Phi3Config")),
    "Gemma 2": Family("Gemma2ForCausalLM", lambda: _config("Gemma2Config", head_dim=8)),
    "Gemma 3 text": Family("Gemma3ForCausalLM", lambda: _config("Gemma3TextConfig", **_SLIDING)),
    "Gemma 3n text": Family("Gemma3nForCausalLM", _gemma3n),
    "Gemma 4 text": Family("Gemma4ForCausalLM", _gemma4),
    "SmolLM 3": Family("SmolLM3ForCausalLM", lambda: _config("SmolLM3Config")),
    "Gemma 3": Family("Gemma3ForConditionalGeneration", _gemma3),
    "Mistral 3": Family("Mistral3ForConditionalGeneration", _mistral3),
    "Llava": Family("LlavaForConditionalGeneration", _llava),
    "Qwen 2.5 VL": Family("Qwen2_5_VLForConditionalGeneration", _qwen25),
    "Qwen 3 VL": Family("Qwen3VLForConditionalGeneration", _qwen3),
    "Qwen 3.5": Family("Qwen3_5ForConditionalGeneration", _qwen35, "Qwen3_5ForCausalLM"),
}
