"""Tiny random models of every architecture with a GGUF layout, their files and adapters, and llama.cpp's logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from gguf_tensors import OFFSET_NORMS
from model_to_gguf import convert
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import factories
from gguf_families import FAMILIES, SIZES

if TYPE_CHECKING:
    from llama_cpp import Llama

TOKENS = list(range(3, 35))

_AFTER_GELU = ("post_feedforward_layernorm", "post_per_layer_input_norm")


@cache
def model(family: str) -> PreTrainedModel:
    kind = FAMILIES[family]
    config = getattr(transformers, f"{kind.config or kind.name}Config")(
        **(SIZES | kind.settings), attn_implementation="eager"
    )
    name = f"{kind.name}ForConditionalGeneration" if kind.wrap else f"{kind.name}ForCausalLM"
    instance: PreTrainedModel = getattr(transformers, name)(kind.wrap(config) if kind.wrap else config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(instance.named_parameters()):
            parameter.copy_(_weight(name, parameter, i, kind.architecture))
    return instance


def _weight(name: str, like: Tensor, seed: int, architecture: str) -> Tensor:
    noise = factories.gaussian(*like.shape, seed=seed)
    one = 0 if architecture in OFFSET_NORMS else 1  # the weight of a norm that changes nothing
    if architecture.startswith("gemma") and any(norm in name for norm in _AFTER_GELU):
        # llama.cpp looks gelu up in a table of float16: what comes of it should be a small part of the whole.
        return 0.02 * noise + (one - 0.9)
    if "norm" in name:
        return 0.1 * noise + one
    return noise * (0.05 if architecture == "gemma" and "mlp" in name else 0.2)


def moved(family: str) -> PreTrainedModel:
    """The model after a change of low rank in every weight matrix, those of experts among them."""
    changed = deepcopy(model(family))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(changed.named_parameters()):
            if parameter.dim() == 2 or (parameter.dim() == 3 and "experts" in name):
                *experts, rows, columns = parameter.shape
                left = factories.gaussian(*experts, rows, 2, seed=i)
                parameter.add_(0.1 * left @ factories.gaussian(*experts, 2, columns, seed=1000 + i))
    return changed


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
    "rank_pattern": {
        "rank_pattern": {
            r"layers\.0\.(?!.*experts).*_proj": 3,  # those have a pattern of PEFT's own
            r"layers\.1\..*(down_proj|w2)": 7,
            r"layers\.1\.self_attn\.(o|out)_proj": 1,
        }
    },
    "alpha_pattern": {"alpha_pattern": {"(down_proj|w2)": 20, "(o|out)_proj": 1.5}},
}


def make_adapter(family: str, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Save an adapter with other factors for every module; return the model with the adapter."""
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": _targets(family)}
    if FAMILIES[family].parameters and "target_modules" not in settings:
        chosen["target_parameters"] = FAMILIES[family].parameters
    chosen |= deepcopy(settings)  # PEFT adds to patterns
    adapted = get_peft_model(deepcopy(model(family)), LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        factors = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
        for i, parameter in enumerate(factors):
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
