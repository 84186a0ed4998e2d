#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter makes sums of rsLoRA adapters too large by the square root of the new rank.
#
# Expected: "cat" of two adapters with weights 1 is the sum of their updates, whatever their scaling rule.
# Seen: the scale of both is folded into the factors, and use_rslora is copied from the first adapter. The sum is then
# scaled by alpha / sqrt(r) with alpha = r, which is sqrt(8) for two adapters of rank 4. "svd" does the same.
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

import torch
from peft import LoraConfig, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.q_proj(x)


def config():
    return LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)


model = get_peft_model(Net(), config(), "one")
model.add_adapter("two", config())
layer = model.base_model.model.q_proj
expected = layer.get_delta_weight("one") + layer.get_delta_weight("two")
ratios = []
for kind, options in (("cat", {}), ("svd", {"svd_rank": 8})):
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], kind, combination_type=kind, **options)
    ratios.append(float((layer.get_delta_weight(kind) * expected).sum() / expected.square().sum()))
    print(f"{kind}: {ratios[-1]:.3f} times the sum")
sys.exit(0 if all(math.isclose(ratio, math.sqrt(8), rel_tol=1e-3) for ratio in ratios) else 1)
PYTHON
