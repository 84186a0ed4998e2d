#!/usr/bin/env bash
# PEFT 0.21.2: an rsLoRA adapter of single experts arrives with gate and up too large by the square root of 2.
#
# transformers 4 held each expert as linear layers, and its adapters have a pair of factors for each of them.
# On loading in transformers 5, PEFT joins gate_proj and up_proj to gate_up_proj.
# Expected: each expert's update is s B A with the factors of the file and s = alpha / sqrt(r).
# Seen: PEFT doubles both r and alpha for gate_up_proj. This keeps alpha / r, but not alpha / sqrt(r).
# Gate and up come out sqrt(2) times too large. down_proj is right, and so is everything without rsLoRA.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0

"$place/venv/bin/python" - "$place" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS, RANK, ALPHA, WIDTH, INNER = 4, 4, 8, 32, 24
SHAPES = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}


def model():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": INNER, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, **sizes, **heads, **experts))


def save(adapter, use_rslora):
    """Saves an adapter as transformers 4 names it, and returns the products B A, stacked over the experts."""
    factors, products = {}, {name: [] for name in SHAPES}
    for expert in range(EXPERTS):
        for name, (rows, columns) in SHAPES.items():
            a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
            layer = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
            factors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            products[name].append(b @ a)
    LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=use_rslora, target_modules=list(SHAPES)).save_pretrained(adapter)
    save_file(factors, adapter / "adapter_model.safetensors")
    return {name: torch.stack(product) for name, product in products.items()}


def ratios(use_rslora):
    adapter = Path(sys.argv[1], f"rslora-{use_rslora}")
    products = save(adapter, use_rslora)
    scale = ALPHA / math.sqrt(RANK) if use_rslora else ALPHA / RANK
    loaded = PeftModel.from_pretrained(model(), adapter)
    wrappers = [module for module in loaded.modules() if hasattr(module, "parameter_name")]
    updates = {wrapper.parameter_name: wrapper.get_delta_weight("default") for wrapper in wrappers}
    gate, up = updates["gate_up_proj"].chunk(2, dim=1)
    seen = {"gate_proj": gate, "up_proj": up, "down_proj": updates["down_proj"]}
    return {
        name: float((seen[name] * product).sum() / (scale * product.square().sum()))
        for name, product in products.items()
    }


torch.manual_seed(0)
plain, rslora = ratios(False), ratios(True)
for rule, found in (("alpha / r", plain), ("alpha / sqrt(r)", rslora)):
    print(f"{rule}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items()) + " times s B A")
known = {"gate_proj": math.sqrt(2), "up_proj": math.sqrt(2), "down_proj": 1}
right = all(math.isclose(ratio, 1, rel_tol=1e-3) for ratio in plain.values())
sys.exit(0 if right and all(math.isclose(rslora[name], known[name], rel_tol=1e-3) for name in known) else 1)
PYTHON
