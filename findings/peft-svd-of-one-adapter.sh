#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter ignores combination_type and svd_rank where one adapter is given.
#
# Expected: combination_type="svd" with svd_rank=4 makes an adapter of rank 4 out of one of rank 8.
# Seen: the new adapter has rank 8 and the same update. Nothing says that the two arguments were ignored.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0

"$place/venv/bin/python" - "$place" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
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


config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(Net(), config, "old")
model.add_weighted_adapter(["old"], [1.0], "new", combination_type="svd", svd_rank=4)
layer = model.base_model.model.q_proj
rank = layer.lora_A["new"].weight.shape[0]
same = torch.allclose(layer.get_delta_weight("new"), layer.get_delta_weight("old"), atol=1e-5)
print(f"asked for rank 4, got rank {rank}; the same update: {same}")
sys.exit(0 if rank == 8 and same else 1)
PYTHON
