#!/usr/bin/env bash
# PEFT 0.21.2: factors of dense layers and shared experts are dropped when an adapter of DeepSeek-V3 or GLM-4 MoE loads.
#
# The first layers of these models have a dense MLP, and the others have shared experts beside the routed ones.
# All of them have layers gate_proj, up_proj and down_proj, so an adapter of these three names covers them all.
# Expected: every pair of factors in the file changes its layer. Dense and shared layers are still linear layers.
# Seen: PEFT replaces the three names by gate_up_proj and down_proj of the routed experts. Only these change.
# There is no error, and no warning names a dropped layer.
# Two warnings say that rank_pattern and alpha_pattern for gate_up_proj were ignored. They concern routed experts only.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0

"$place/venv/bin/python" - "$place" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

RANK, ALPHA, WIDTH, DENSE, INNER, EXPERTS = 4, 8, 32, 48, 24, 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS = {
    "DeepSeek-V3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **LATENT)),
    "GLM-4 MoE": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, head_dim=8)),
}
DENSE_MLP, SHARED = "model.layers.0.mlp", "model.layers.1.mlp.shared_experts"
ROUTED = [f"model.layers.1.mlp.experts.{expert}" for expert in range(EXPERTS)]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def save(adapter):
    """Saves an adapter as transformers 4 names it, and returns the update of each layer."""
    factors, updates = {}, {}
    for mlp in (DENSE_MLP, SHARED, *ROUTED):
        inner = DENSE if mlp == DENSE_MLP else INNER
        for name in PROJECTIONS:
            rows, columns = (WIDTH, inner) if name == "down_proj" else (inner, WIDTH)
            a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
            layer = f"{mlp}.{name}"
            factors[f"base_model.model.{layer}.lora_A.weight"] = a
            factors[f"base_model.model.{layer}.lora_B.weight"] = b
            updates[layer] = ALPHA / RANK * b @ a
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS).save_pretrained(adapter)
    save_file(factors, adapter / "adapter_model.safetensors")
    return updates


def changes(kind):
    """Returns the largest change of each kind of layer, relative to its update, and warnings on dropped layers."""
    adapter = Path(sys.argv[1], kind)
    updates = save(adapter)
    model = MODELS[kind]()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    down = "model.layers.1.mlp.experts.down_proj"
    seen = {name: after[name] - before[name] for name in before}
    groups = {
        "dense": [(seen[f"{DENSE_MLP}.{name}.weight"], updates[f"{DENSE_MLP}.{name}"]) for name in PROJECTIONS],
        "shared": [(seen[f"{SHARED}.{name}.weight"], updates[f"{SHARED}.{name}"]) for name in PROJECTIONS],
        "routed": [(seen[down], torch.stack([updates[f"{expert}.down_proj"] for expert in ROUTED]))],
    }
    largest = {name: max(float(change.norm() / update.norm()) for change, update in groups[name]) for name in groups}
    texts = [str(warning.message) for warning in caught]
    named = [text for text in texts if DENSE_MLP in text or "shared_experts" in text]
    return largest, named


torch.manual_seed(0)
same = True
for kind in MODELS:
    largest, named = changes(kind)
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in largest.items())
    print(f"{kind}, changes relative to the updates: {ratios}; warnings that name a dropped layer: {len(named)}")
    dropped = largest["dense"] == largest["shared"] == 0
    same = same and dropped and abs(largest["routed"] - 1) < 1e-3 and not named
sys.exit(0 if same else 1)
PYTHON
