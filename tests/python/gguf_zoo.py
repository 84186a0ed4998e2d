"""Tiny random models of every architecture with a GGUF layout, their files and adapters, and llama.cpp's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from model_to_gguf import convert
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import factories

if TYPE_CHECKING:
    from llama_cpp import Llama

TOKENS = list(range(3, 35))

_SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

_SIZES = {
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
    "granite": Family(
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 1.5,
            "attention_multiplier": 0.3,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": Family("Olmo2"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "gemma": Family("Gemma", {"head_dim": 16}),
    "gemma2": Family("Gemma2", _GEMMA),
    # Every sixth layer attends to everything, with other rotary frequencies.
    "gemma3": Family("Gemma3", _GEMMA | {"num_hidden_layers": 6}, config="Gemma3Text"),
    "gemma3 (vision)": Family(
        "Gemma3", _GEMMA | {"num_hidden_layers": 6}, config="Gemma3Text", gguf_name="gemma3", wrap=_gemma3
    ),
    "phi3": Family("Phi3", targets=_FUSED),
}


@cache
def model(family: str) -> PreTrainedModel:
    kind = FAMILIES[family]
    config = getattr(transformers, f"{kind.config or kind.name}Config")(
        **(_SIZES | kind.settings), attn_implementation="eager"
    )
    name = f"{kind.name}ForConditionalGeneration" if kind.wrap else f"{kind.name}ForCausalLM"
    instance: PreTrainedModel = getattr(transformers, name)(kind.wrap(config) if kind.wrap else config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(instance.named_parameters()):
            parameter.copy_(_weight(name, parameter, i, kind.architecture))
    return instance


def _weight(name: str, like: Tensor, seed: int, architecture: str) -> Tensor:
    noise = factories.gaussian(*like.shape, seed=seed)
    gemma = architecture.startswith("gemma")
    if gemma and "post_feedforward_layernorm" in name:
        # llama.cpp looks gelu up in a table of float16: what comes of it should be a small part of the whole.
        return 0.02 * noise - 0.9
    if "norm" in name:
        return 0.1 * noise + (0 if gemma else 1)
    return noise * (0.05 if architecture == "gemma" and "mlp" in name else 0.2)


def save_model(family: str, directory: Path) -> Path:
    """Write the model as Hugging Face does."""
    model(family).save_pretrained(directory)
    return directory


def save_gguf(family: str, path: Path) -> Path:
    """Write the model as a GGUF file."""
    return convert(model(family), path, name="tiny")


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    # PEFT sorts the keys on saving and the first match counts, so no two may match one name.
    "rank_pattern": {"rank_pattern": {r"layers\.0\..*_proj": 3, r"layers\.1\..*down_proj": 7, "1.self_attn.o_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"down_proj": 20, "o_proj": 1.5}},
}


def make_adapter(family: str, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Save an adapter with other factors for every module; return the model with the adapter."""
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": _targets(family)}
    adapted = get_peft_model(deepcopy(model(family)), LoraConfig(task_type="CAUSAL_LM", **(chosen | settings)))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_((0.1 * factories.gaussian(*parameter.shape, seed=100 + i)).to(dtype))
    (adapted if dtype == torch.float32 else deepcopy(adapted).to(dtype)).save_pretrained(
        str(directory), save_embedding_layers=False
    )
    return adapted


def _targets(family: str) -> list[str] | str:
    """The language model's modules: the towers of a model that also sees have some of the same names."""
    names = "|".join(FAMILIES[family].targets)
    return rf".*language_model.*\.({names})" if FAMILIES[family].wrap else FAMILIES[family].targets


@torch.inference_mode()
def logits(instance: torch.nn.Module) -> np.ndarray:
    """Logits of the reference at every position of TOKENS, (tokens, vocabulary)."""
    found: np.ndarray = instance(torch.tensor([TOKENS])).logits[0].float().numpy()
    return found


def open_llama(path: Path, **settings: Any) -> Llama:
    import llama_cpp

    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(
        str(path), **(exact | {"n_ctx": 256, "logits_all": True, "n_threads": 1, "verbose": False} | settings)
    )


def evaluate(llama: Llama, tokens: Sequence[int] = TOKENS) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def llama_logits(path: Path, lora: Path | None = None) -> np.ndarray:
    with closing(open_llama(path, lora_path=str(lora) if lora else None)) as llama:
        return evaluate(llama)
