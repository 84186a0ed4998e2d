#!/usr/bin/env bash
# PEFT 0.21.2: hotswap_adapter mixes up experts when the new adapter of an expert parameter has a lower rank.
#
# Expected: the model after the swap has the updates that a fresh load of the new adapter gives.
# A lower rank is supported: hotswap_adapter copies the new factors to the start of the old ones and zeroes the rest.
# Seen: lora_A of an expert parameter holds r rows for each expert, one expert after the other.
# The new rows stay together at the start, but the layer still divides all rows evenly among the experts.
# From rank 4 to rank 2, expert 1 is given the rows of expert 2. Experts 2 and 3 are given zeros.
# There is no error and no warning. A linear layer of the same adapter arrives right, and so does an equal rank.
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
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_experts=4, num_experts_per_tok=2, **sizes, **heads))


def save(name, rank, seed):
    adapter = Path(sys.argv[1], name)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    base = model()
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, **targets)
    get_peft_model(base, config).save_pretrained(adapter)
    return adapter


def updates(loaded):
    """Returns the updates of q_proj and of each expert's down_proj."""
    layer = loaded.base_model.model.model.layers[0]
    return [layer.self_attn.q_proj.get_delta_weight("default"), *layer.mlp.experts.get_delta_weight("default")]


def compare(old, new):
    """Returns the relative difference of each update after the swap, and the size of each."""
    swapped = PeftModel.from_pretrained(model(), old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hotswap_adapter(swapped, new, "default", torch_device="cpu")
    fresh = updates(PeftModel.from_pretrained(model(), new))
    pairs = [(seen, expected, expected.norm()) for seen, expected in zip(updates(swapped), fresh, strict=True)]
    return [float((seen - expected).norm() / size) for seen, expected, size in pairs], [
        float(seen.norm() / size) for seen, _, size in pairs
    ]


old = save("old", rank=4, seed=1)
equal, _ = compare(old, save("equal", rank=4, seed=2))
lower, sizes = compare(old, save("lower", rank=2, seed=3))
for name, differences in (("rank 4 to 4", equal), ("rank 4 to 2", lower)):
    linear, *experts = [f"{difference:.2f}" for difference in differences]
    print(f"{name}: a fresh load differs by {linear} in q_proj, by {', '.join(experts)} in experts 0 to 3")
arrived = max(*equal, lower[0], lower[1]) < 1e-5
sys.exit(0 if arrived and lower[2] > 0.5 and sizes[3] == sizes[4] == 0 else 1)
PYTHON
