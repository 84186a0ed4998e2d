"""Whether a corrected adapter follows from the adapter and the subspace file that its report names.

python examples/audit.py CORRECTED ADAPTER SUBSPACE
"""

import sys

import csulora

if len(sys.argv) != 4:
    sys.exit(__doc__)

corrected, original, subspace = sys.argv[1:]
checks = csulora.audit(corrected, original, csulora.Subspace.open(subspace))
for check in checks:
    print("holds" if check.holds else "FAILS", check.what)
sys.exit(not all(check.holds for check in checks))
