"""Adapters of every kind that PEFT makes, on tiny random models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import factories

WIDTH, VOCABULARY, LAYERS = 32, 64, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(tied: bool = False) -> PreTrainedModel:
    return _seeded(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=tied))


def llama_of_pairs() -> PreTrainedModel:
    """Return a model with modules of the shapes that `factories.model_pair` has."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return _seeded(LlamaForCausalLM, config)


def tied_llama() -> PreTrainedModel:
    return llama(tied=True)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=16)
    return _seeded(GPT2LMHeadModel, config)


def mixtral() -> PreTrainedModel:
    return _seeded(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4))


def _seeded(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config).eval()
    return model


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Kind:
    """A model and the settings of an adapter for it."""

    settings: dict[str, Any]
    model: Callable[[], PreTrainedModel] = llama
    dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)

    def make(self, directory: Path) -> PeftModel:
        """Save the adapter into `directory`, and return the model that it was made on."""
        torch.manual_seed(1)
        # Without this initialisation B is zero, and the update with it.
        settings: dict[str, Any] = {"target_modules": ATTENTION, "init_lora_weights": False, "r": 4, "lora_alpha": 12}
        adapted = get_peft_model(self.model(), LoraConfig(task_type="CAUSAL_LM", **(settings | self.settings)))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(factories.gaussian(*parameter.shape, seed=len(name)) / 8)
        adapted.to(self.dtype).save_pretrained(str(directory), **self.save)
        return adapted


PLAIN_LORA = {
    "plain": Kind({}),
    "MLP too": Kind({"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "all-linear": Kind({"target_modules": "all-linear"}),
    "rsLoRA": Kind({"use_rslora": True}),
    "rank_pattern": Kind({"rank_pattern": {"k_proj": 2, "layers.1.self_attn.v_proj": 7}}),
    "alpha_pattern": Kind({"alpha_pattern": {"q_proj": 3, "o_proj": 40.5}}),
    "both patterns, rsLoRA": Kind(
        {
            "use_rslora": True,
            "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 6},
            "alpha_pattern": {"^model.layers.1.self_attn.o_proj": 5, "(q|k)_proj": 9},
        }
    ),
    "regular expression": Kind({"target_modules": r"(?:.*?layers.*?(?:self_attn|attn).*?(?:q_proj|v_proj).*?)"}),
    "exclude_modules": Kind({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude_modules by expression": Kind({"exclude_modules": r".*\.0\..*q_proj"}),
    "layers_to_transform": Kind({"layers_to_transform": [1]}),
    "layers_pattern": Kind({"layers_to_transform": 0, "layers_pattern": "layers"}),
    "gaussian initialisation": Kind({"init_lora_weights": "gaussian"}),
    "orthogonal initialisation": Kind({"init_lora_weights": "orthogonal"}),
    "embedding": Kind({"target_modules": ["embed_tokens", "v_proj"]}, save={"save_embedding_layers": False}),
    "tied weights": Kind(
        {"target_modules": ["embed_tokens", "up_proj"]}, model=tied_llama, save={"save_embedding_layers": False}
    ),
    "head": Kind({"target_modules": ["lm_head", "v_proj"]}, save={"save_embedding_layers": False}),
    "Conv1D": Kind({"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, model=gpt2),
    "float16": Kind({}, dtype=torch.float16),
    "bfloat16": Kind({"use_rslora": True}, dtype=torch.bfloat16),
}

OTHER_THAN_PLAIN_LORA = {
    "DoRA": Kind({"use_dora": True}),
    "lora_bias": Kind({"lora_bias": True}),
    "bias": Kind({"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}, model=gpt2),
    "PiSSA": Kind({"init_lora_weights": "pissa"}),
    "PiSSA, iterated": Kind({"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": Kind({"init_lora_weights": "olora"}),
    "modules_to_save": Kind({"modules_to_save": ["lm_head"]}),
    "trainable tokens": Kind({"trainable_token_indices": [1, 2]}),
    "aLoRA": Kind({"alora_invocation_tokens": [3, 4]}),
    "layer_replication": Kind({"layer_replication": [(0, 2), (1, 2)]}),
    "target_parameters": Kind({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, model=mixtral),
    "saved embedding": Kind({"target_modules": ["embed_tokens", "v_proj"]}, save={"save_embedding_layers": True}),
}


def updates(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """PEFT's own idea of every module's update, in the layout of its weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach().float()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.scaling
    }


@cache
def aligned_states(model: Callable[[], PreTrainedModel]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights and those of an aligned sibling."""
    state = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    return state, factories.moved(state)


def save_model_pair(model: Callable[[], PreTrainedModel], directory: Path) -> tuple[Path, Path]:
    """Save the model and its aligned sibling as Hugging Face does."""
    paths = directory / "base", directory / "aligned"
    for path, state in zip(paths, aligned_states(model), strict=True):
        instance = model()
        instance.load_state_dict(state)
        instance.save_pretrained(path)
    return paths
