"""Tiny models with experts, adapters of theirs as PEFT and transformers 4 write them, and what PEFT answers."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import csulora

PROMPT = [1, 9, 17, 23, 40, 5]
STEPS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM takes on a CPU; SGLang takes no other than hidden size over heads
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
_FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen 3 MoE": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=32)
    ),
    "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES, num_local_experts=4)),
    "Qwen 2 MoE": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_SIZES, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32
        )
    ),
    "Granite MoE": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**_SIZES, num_local_experts=4)
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**_SIZES, num_local_experts=4)),
}
_ATTENTION = ["q_proj", "k_proj", "v_proj"]  # SGLang wants all three
_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": _ATTENTION, "target_parameters": _PARAMETERS},
    "gate and up": {"target_modules": _ATTENTION, "target_parameters": _PARAMETERS[:1]},
    "all-linear": {"target_modules": "all-linear"},
    "rank 16": {"target_modules": _ATTENTION, "target_parameters": _PARAMETERS, "r": 16},
}
_FURTHER_TARGETS: dict[str, dict[str, dict[str, Any]]] = {
    "Qwen 2 MoE": {"shared expert": {"target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]}}
}


def kernels_plugin(root: Path, group: str) -> Path:
    """Write a plugin that installs `expert_kernels` in a server's processes; return the directory to import it from."""
    plugin = root / "plugin" / "expert_kernels-0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: expert-kernels\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(f"[{group}]\nexpert_kernels = expert_kernels:install\n")
    return plugin.parent


def make(root: Path, family: str, policy: str) -> SimpleNamespace:
    """Write a model, its subspace file and adapters of rank 4 below ``root``; corrected ones as PEFT reads them."""
    model = _move(_FAMILIES[family]().eval(), 0.2, seed=0)
    model.save_pretrained(root / "base")
    _move(model, 0.05, seed=1000).save_pretrained(root / "aligned")
    subspace = csulora.extract(root / "base", root / "aligned", rank=8, expert_rank=8, output=root / "subspace")
    targets = _TARGETS | _FURTHER_TARGETS.get(family, {})
    raw = {name: root / name for name in targets}
    for name, path in raw.items():
        _adapt(model, path, **{"r": 4, "lora_alpha": 8} | targets[name])
    if subspace.provenance.experts.is_read_per_expert:
        raw["one by one"] = _one_by_one(raw["both"], subspace, root / "one by one")
    corrected = {name: root / f"{name}-corrected" for name in raw}
    for name, path in raw.items():
        fixed, _ = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.load(policy), "fused")
        csulora.save_adapter(fixed, corrected[name])
    return SimpleNamespace(
        root=root, model=root / "aligned", subspace=root / "subspace", raw=raw, corrected=corrected, policy=policy
    )


def answer(model: Path, adapter: Path | None) -> dict[str, list]:
    """Return what PEFT answers to `PROMPT`: the likeliest tokens and their log-probabilities."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    tokens, logprobs = list(PROMPT), []
    for _ in range(STEPS):
        with torch.inference_mode():
            found = loaded(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(found.argmax()))
        logprobs.append(float(found[tokens[-1]]))
    return {"tokens": tokens[len(PROMPT) :], "logprobs": logprobs}


def _move(model: Any, size: float, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def _adapt(model: Any, path: Path, **settings: Any) -> None:
    adapted = get_peft_model(deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(len(path.name))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(path), save_embedding_layers=False)


def _one_by_one(fused: Path, subspace: csulora.Subspace, path: Path) -> Path:
    """Write an adapter as transformers 4 did, with factors for each expert, and none for the up projections."""
    found, _ = csulora.correct(csulora.load_adapter(fused), subspace, csulora.Policy.none(), "per-expert")
    modules = {name: module for name, module in found.modules.items() if not name.endswith((".up_proj", ".w3"))}
    csulora.save_adapter(replace(found, modules=modules, partial=True), path)
    return path
