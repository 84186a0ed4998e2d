"""Tiny language models inside models that also see or hear, built by transformers itself."""

from typing import Any

import transformers

from language_families import GATED_DELTA, SLIDING, WIDTH, Family, configured, gemma4, lfm2, llama4

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SIGLIP: dict[str, Any] = _TOWER | {"model_type": "siglip_vision_model"}
_CLIP: dict[str, Any] = _TOWER | {"model_type": "clip_vision_model"}
_PIXTRAL: dict[str, Any] = _TOWER | {"model_type": "pixtral", "head_dim": 16}
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


def _text(name: str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = configured(name, **settings).to_dict()
    return found


def _rotary(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


def _gemma3() -> Any:
    tokens: dict[str, Any] = {
        "mm_tokens_per_image": 4,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
    }
    return transformers.Gemma3Config(text_config=_text("Gemma3TextConfig", **SLIDING), vision_config=_TOWER, **tokens)


def _gemma4() -> Any:
    tower = _TOWER | {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 64}
    tokens: dict[str, Any] = {"image_token_id": 60, "boi_token_id": 61, "eoi_token_id": 62}
    return transformers.Gemma4Config(text_config=gemma4().to_dict(), vision_config=tower, audio_config=None, **tokens)


def _mistral3(text: str) -> Any:
    return transformers.Mistral3Config(
        text_config=_text(text, head_dim=8), vision_config=_PIXTRAL, image_token_index=60
    )


def _mllama() -> Any:
    layers = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    text = _text("MllamaTextConfig", **layers)
    return transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=60)


def _llama4() -> Any:
    widths = {"vision_output_dim": WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH}
    tower = _TOWER | {"intermediate_size": 128} | widths
    return transformers.Llama4Config(text_config=llama4().to_dict(), vision_config=tower, image_token_index=60)


def _qwen2_vl() -> Any:
    text = _text("Qwen2VLTextConfig", rope_parameters=_rotary(1, 1, 2))
    tower = {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _qwen25_vl() -> Any:
    text = _text("Qwen2_5_VLTextConfig", rope_parameters=_rotary(1, 1, 2))
    tower = _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _qwen3_vl() -> Any:
    text = _text("Qwen3VLTextConfig", head_dim=8, rope_parameters=_rotary(2, 1, 1))
    tower = _QWEN_TOWER | {"num_position_embeddings": 16, "temporal_patch_size": 1, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _qwen35() -> Any:
    text = _text("Qwen3_5TextConfig", **GATED_DELTA)
    tower = _QWEN_TOWER | {"num_position_embeddings": 16, "temporal_patch_size": 1}
    return transformers.Qwen3_5Config(text_config=text, vision_config=tower, **_QWEN_TOKENS)


def _glm4v() -> Any:
    text = _text("Glm4vTextConfig", rope_parameters=_rotary(1, 1, 2))
    tower = _QWEN_TOWER | {"image_size": 16}
    return transformers.Glm4vConfig(text_config=text, vision_config=tower, image_token_id=60, video_token_id=61)


def _paligemma() -> Any:
    text, tower = _text("GemmaConfig", head_dim=8), _SIGLIP | {"projection_dim": WIDTH}
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=60, projection_dim=WIDTH
    )


def _internvl() -> Any:
    tower = _TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    return transformers.InternVLConfig(text_config=_text("Qwen2Config"), vision_config=tower, image_token_id=60)


def _lfm2_vl() -> Any:
    tower = _TOWER | {"model_type": "siglip2_vision_model", "num_patches": 16}
    return transformers.Lfm2VlConfig(text_config=lfm2().to_dict(), vision_config=tower, image_token_id=60)


def _smolvlm(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")
    return config(text_config=_text("LlamaConfig"), vision_config=_TOWER, image_token_id=60, scale_factor=2)


def _llava_onevision() -> Any:
    tokens: dict[str, Any] = {"image_token_index": 60, "video_token_index": 61}
    return transformers.LlavaOnevisionConfig(text_config=_text("Qwen2Config"), vision_config=_SIGLIP, **tokens)


def _aya() -> Any:
    text = _text("Cohere2Config", head_dim=8)
    return transformers.AyaVisionConfig(text_config=text, vision_config=_SIGLIP, image_token_index=60)


def _qwen2_audio() -> Any:
    tower = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    tower |= {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 8}
    return transformers.Qwen2AudioConfig(text_config=_text("Qwen2Config"), audio_config=tower, audio_token_index=60)


def _voxtral() -> Any:
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"num_mel_bins": 8, "max_source_positions": 8, "head_dim": 16}
    return transformers.VoxtralConfig(text_config=_text("LlamaConfig"), audio_config=tower, audio_token_id=60)


def _seeing(name: str, text_config: str, tower: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")
    return config(text_config=_text(text_config), vision_config=tower, image_token_index=60)


def _wrapper(name: str, config: Any, text_model: str | None = None, tower: str | None = None) -> Family:
    return Family(f"{name}ForConditionalGeneration", config, text_model, tower=tower)


WRAPPER_FAMILIES: dict[str, Family] = {
    "Gemma 3": _wrapper("Gemma3", _gemma3, "Gemma3ForCausalLM"),
    "Gemma 4": _wrapper("Gemma4", _gemma4, "Gemma4ForCausalLM", tower=r".*vision_tower.*"),
    "Mistral 3": _wrapper("Mistral3", lambda: _mistral3("MistralConfig"), "MistralForCausalLM"),
    "Ministral 3": _wrapper("Mistral3", lambda: _mistral3("Ministral3Config"), "Ministral3ForCausalLM"),
    "Llama 3.2 Vision": _wrapper("Mllama", _mllama, "MllamaForCausalLM"),
    "Llama 4, dense": _wrapper("Llama4", _llama4, "Llama4ForCausalLM"),
    "Qwen 2 VL": _wrapper("Qwen2VL", _qwen2_vl),
    "Qwen 2.5 VL": _wrapper("Qwen2_5_VL", _qwen25_vl),
    "Qwen 3 VL": _wrapper("Qwen3VL", _qwen3_vl),
    "Qwen 3.5": _wrapper("Qwen3_5", _qwen35, "Qwen3_5ForCausalLM"),
    "GLM-4V": _wrapper("Glm4v", _glm4v),
    "PaliGemma": _wrapper("PaliGemma", _paligemma, "GemmaForCausalLM"),
    "InternVL": _wrapper("InternVL", _internvl, "Qwen2ForCausalLM"),
    "LFM2-VL": _wrapper("Lfm2Vl", _lfm2_vl, "Lfm2ForCausalLM"),
    "SmolVLM": _wrapper("SmolVLM", lambda: _smolvlm("SmolVLM")),
    "Idefics 3": _wrapper("Idefics3", lambda: _smolvlm("Idefics3")),
    "Llava": _wrapper("Llava", lambda: _seeing("Llava", "LlamaConfig", _CLIP), "LlamaForCausalLM"),
    "Llava-NeXT": _wrapper("LlavaNext", lambda: _seeing("LlavaNext", "LlamaConfig", _CLIP), "LlamaForCausalLM"),
    "Llava-OneVision": _wrapper("LlavaOnevision", _llava_onevision, "Qwen2ForCausalLM"),
    "Aya Vision": _wrapper("AyaVision", _aya, "Cohere2ForCausalLM"),
    "Qwen 2 Audio": _wrapper("Qwen2Audio", _qwen2_audio, "Qwen2ForCausalLM"),
    "Voxtral": _wrapper("Voxtral", _voxtral, "LlamaForCausalLM"),
}
