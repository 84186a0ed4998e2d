"""The undo of several adapters that are applied together.

python examples/sum_of_adapters.py SUBSPACE ADAPTER ADAPTER...
"""

import sys

import csulora

if len(sys.argv) < 3:
    sys.exit(__doc__)

subspace = csulora.Subspace.open(sys.argv[1])
adapters = [csulora.load_adapter(path) for path in sys.argv[2:]]
for adapter in (*adapters, csulora.combine(adapters, subspace)):
    _, report = csulora.correct(adapter, subspace, csulora.Policy.none())  # changes nothing, and measures
    print(f"{adapter.path.name}: total undo {report.totals.undo:+.3f}, largest {report.totals.largest_undo:+.3f}")
