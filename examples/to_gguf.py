"""A corrected adapter as a GGUF LoRA file for llama.cpp.

python examples/to_gguf.py MODEL ADAPTER SUBSPACE OUT.gguf
"""

import sys

import csulora

if len(sys.argv) != 5:
    sys.exit(__doc__)

model, path, subspace, out = sys.argv[1:]
adapter = csulora.load_adapter(path)
fixed, _ = csulora.correct(adapter, csulora.Subspace.open(subspace), csulora.Policy.protect(1.0))
sha256 = csulora.save_adapter(fixed, out, "gguf", base_model=model, outtype="f16")
print(f"{out}: sha256 {sha256}")
