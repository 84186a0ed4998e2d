#!/usr/bin/env bash
# PEFT 0.21.2: an empty kasa_config in adapter_config.json switches KaSA on.
#
# Expected: an empty object is as good as null, as for loftq_config, whose default is an empty object.
# Seen: the layer becomes a KaSA layer, and its base weight loses its smallest singular values. The change stays
# after the adapter is unloaded.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0

"$place/venv/bin/python" - "$place" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.q_proj(x)


adapter = Path(sys.argv[1], "adapter")
get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
file = adapter / "adapter_config.json"
settings = json.loads(file.read_text())


def change_after_unloading(kasa_config):
    file.write_text(json.dumps(settings | {"kasa_config": kasa_config}))
    model = Net()
    before = model.q_proj.weight.detach().clone()
    after = PeftModel.from_pretrained(model, adapter).unload().q_proj.weight
    return float((after - before).norm() / before.norm())


null, empty = change_after_unloading(None), change_after_unloading({})
print(f"base weight changed by {null:.1%} with null, by {empty:.1%} with an empty object")
sys.exit(0 if null == 0 and empty > 0.01 else 1)
PYTHON
