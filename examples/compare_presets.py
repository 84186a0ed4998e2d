"""Undo and relative change of an adapter under every preset.

python examples/compare_presets.py SUBSPACE ADAPTER
"""

import sys

import csulora

if len(sys.argv) != 3:
    sys.exit(__doc__)

subspace = csulora.Subspace.open(sys.argv[1])
adapter = csulora.load_adapter(sys.argv[2])
print(f"{'preset':8} {'largest undo':>20} {'relative change':>16}")
for name in ("none", "csulora", "project", "protect"):
    _, report = csulora.correct(adapter, subspace, csulora.Policy.load(name))
    totals = report.totals
    undo = f"{totals.largest_undo:+.3f} -> {totals.largest_undo_after:+.3f}"
    print(f"{name:8} {undo:>20} {totals.relative_change:>16.1%}")
