"""PEFT loads an adapter, and gets the corrected one.

python examples/peft_guard.py MODEL ADAPTER SUBSPACE
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM

import csulora
from csulora.hooks import peft

if len(sys.argv) != 4:
    sys.exit(__doc__)

path, adapter, subspace = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path)
with peft.guard(subspace, csulora.Policy.protect(1.0)):
    adapted = PeftModel.from_pretrained(model, adapter)
print(f"loaded corrected: {', '.join(adapted.peft_config)}")
