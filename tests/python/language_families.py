"""Tiny language models that see nothing else, built by transformers itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

VOCABULARY, WIDTH = 64, 32
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
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": 64}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_HEAD: dict[str, Any] = {"head_dim": 8}
# PEFT refuses Mamba's out_proj and conv1d, which `all-linear` would name.
WITHOUT_MAMBA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj")
SLIDING: dict[str, Any] = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
GATED_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Family:
    """A class of transformers, and its configuration.

    Attributes:
        model: name of the class.
        config: makes the configuration.
        text_model: the text-only class of the same checkpoint, if there is one.
        linear: what takes the place of PEFT's ``all-linear`` where PEFT refuses some of it.
        tower: modules of the tower that PEFT cannot adapt, as an expression.
    """

    model: str
    config: Callable[[], Any]
    text_model: str | None = None
    linear: str | tuple[str, ...] = "all-linear"
    tower: str | None = None


def configured(name: str, **settings: Any) -> Any:
    """Return the configuration of that class with the usual sizes."""
    return getattr(transformers, name)(**_COMMON | settings)


def _plain(name: str, **settings: Any) -> Family:
    """Return a family whose layers are all alike, with one of them."""
    return Family(f"{name}ForCausalLM", lambda: configured(f"{name}Config", **{"num_hidden_layers": 1} | settings))


def _mixed(name: str, **settings: Any) -> Family:
    """Return a family with two layers, which may differ."""
    return Family(f"{name}ForCausalLM", lambda: configured(f"{name}Config", **settings))


def gemma3n() -> Any:
    layers = {"laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "intermediate_size": [48, 48]}
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    sparsity = {"activation_sparsity_pattern": [0.0, 0.0]}
    return configured("Gemma3nTextConfig", **SLIDING, **layers, **inputs, **sparsity)


def gemma4() -> Any:
    inputs = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    return configured("Gemma4TextConfig", **SLIDING, global_head_dim=8, **inputs)


def llama4() -> Any:
    """Only dense layers."""
    layers = {"layer_types": ["chunked_attention", "full_attention"], "moe_layers": [], "intermediate_size_mlp": 48}
    return configured("Llama4TextConfig", head_dim=8, attention_chunk_size=32, **layers)


def lfm2() -> Any:
    return configured("Lfm2Config", layer_types=["conv", "full_attention"])


def _nemotron_h() -> Any:
    mixer = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
    return configured("NemotronHConfig", layers_block_type=["mamba", "attention", "mlp"], head_dim=8, **mixer)


def _granite_hybrid() -> Any:
    layers = {"num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}
    return configured("GraniteMoeHybridConfig", **layers, **_MAMBA)


def _falcon_h1() -> Any:
    return configured("FalconH1Config", **_MAMBA | {"mamba_n_heads": 4}, mamba_d_ssm=32, num_hidden_layers=1)


def _recurrent_gemma() -> Any:
    layers = {"lru_width": WIDTH, "block_types": ["recurrent", "attention"], "attention_window_size": 16}
    return configured("RecurrentGemmaConfig", **layers)


def _gpt_neo() -> Any:
    layers: dict[str, Any] = {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
    return transformers.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, max_position_embeddings=64, **layers)


def _qwen2_moe() -> Any:
    """Experts stay as they are; attention and the shared expert are adapted."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    return configured("Qwen2MoeConfig", **experts, shared_expert_intermediate_size=24)


LANGUAGE_FAMILIES: dict[str, Family] = {
    "Llama 3": _mixed("Llama", tie_word_embeddings=False),
    "Mistral": _plain("Mistral", tie_word_embeddings=False),
    "Ministral": _plain("Ministral", **_HEAD),
    "Ministral 3 text": _plain("Ministral3", **_HEAD),
    "Qwen 2": _plain("Qwen2"),
    "Qwen 3": _plain("Qwen3", **_HEAD),
    "Qwen 3.5 text": Family("Qwen3_5ForCausalLM", lambda: configured("Qwen3_5TextConfig", **GATED_DELTA)),
    "Qwen 2 MoE, shared": Family("Qwen2MoeForCausalLM", _qwen2_moe),
    "Phi": _plain("Phi"),
    "Phi 3": _plain("Phi3"),
    "Gemma": _plain("Gemma", **_HEAD),
    "Gemma 2": _mixed("Gemma2", **_HEAD),
    "Gemma 3 text": Family("Gemma3ForCausalLM", lambda: configured("Gemma3TextConfig", **SLIDING)),
    "Gemma 3n text": Family("Gemma3nForCausalLM", gemma3n),
    "Gemma 4 text": Family("Gemma4ForCausalLM", gemma4),
    "Llama 4 text, dense": Family("Llama4ForCausalLM", llama4),
    "SmolLM 3": _plain("SmolLM3"),
    "GLM": _plain("Glm", **_HEAD),
    "GLM-4": _plain("Glm4", **_HEAD),
    "OLMo": _plain("Olmo"),
    "OLMo 2": _plain("Olmo2"),
    "OLMo 3": _mixed("Olmo3"),
    "OLMo hybrid": _mixed("OlmoHybrid"),
    "Granite": _plain("Granite"),
    "Granite hybrid, dense": Family("GraniteMoeHybridForCausalLM", _granite_hybrid),
    "LFM2": Family("Lfm2ForCausalLM", lfm2),
    "Falcon": _plain("Falcon"),
    "Falcon-H1": Family("FalconH1ForCausalLM", _falcon_h1, linear=WITHOUT_MAMBA),
    "Nemotron": _plain("Nemotron", **_HEAD),
    "Nemotron-H": Family("NemotronHForCausalLM", _nemotron_h, linear=WITHOUT_MAMBA),
    "Bamba": Family(
        "BambaForCausalLM", lambda: configured("BambaConfig", attn_layer_indices=[1], **_MAMBA), linear=WITHOUT_MAMBA
    ),
    "RecurrentGemma": Family("RecurrentGemmaForCausalLM", _recurrent_gemma),
    "Cohere": _plain("Cohere"),
    "Cohere 2": _mixed("Cohere2", **_HEAD),
    "StarCoder 2": _plain("Starcoder2"),
    "StableLM": _plain("StableLm"),
    "Exaone 4": _mixed("Exaone4"),
    "ERNIE 4.5": _plain("Ernie4_5", **_HEAD),
    "Seed-OSS": _plain("SeedOss", **_HEAD),
    "Hunyuan": _plain("HunYuanDenseV1", **_HEAD),
    "Apertus": _plain("Apertus"),
    "Arcee": _plain("Arcee"),
    "Helium": _plain("Helium", **_HEAD),
    "OPT": _plain("OPT", ffn_dim=48, word_embed_proj_dim=WIDTH),
    "GPT-2": Family("GPT2LMHeadModel", lambda: transformers.GPT2Config(**_GPT)),
    "GPT BigCode": Family("GPTBigCodeForCausalLM", lambda: transformers.GPTBigCodeConfig(**_GPT)),
    "GPT-J": Family("GPTJForCausalLM", lambda: transformers.GPTJConfig(**_GPT, rotary_dim=4)),
    "GPT-Neo": Family("GPTNeoForCausalLM", _gpt_neo),
    "GPT-NeoX": _plain("GPTNeoX"),
    "BLOOM": Family(
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=4),
    ),
    "MPT": Family(
        "MptForCausalLM",
        lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layers=1, n_heads=4, max_seq_len=64),
    ),
}
