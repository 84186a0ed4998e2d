"""From two checkpoints and an adapter to a corrected adapter.

python examples/correct.py BASE ALIGNED ADAPTER OUT [POLICY]
"""

import sys

import csulora

if not 5 <= len(sys.argv) <= 6:
    sys.exit(__doc__)

base, aligned, path, out, *policy = sys.argv[1:]
subspace = csulora.extract(base, aligned, rank=16)
subspace.save(f"{out}.subspace.safetensors")
adapter = csulora.load_adapter(path)
fixed, report = csulora.correct(adapter, subspace, csulora.Policy.load(policy[0] if policy else "protect"))
csulora.save_adapter(fixed, out)
print(report.verdict.text)
