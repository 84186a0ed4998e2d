"""Which adapters to come are unlike those that a policy was fitted on: those that undo more of the alignment."""

from __future__ import annotations

from collections.abc import Sequence

from csulora.adapters.lora import Adapter
from csulora.correction.correct import correct
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace

_ROUNDING = 1e-6  # what another number of threads may make of a total, amply


def undo_limit(adapters: Sequence[Adapter], subspace: Subspace, policy: Policy) -> float:
    """Return the largest total undo of the adapters, and a little: the `Policy.max_total_undo` that lets them all pass.

    Args:
        adapters: that a policy is fitted on.
        subspace: to use it with; undo is of its directions.
        policy: with what it lets pass of uncovered modules.

    Raises:
        RefusedError: an adapter does not fit the subspace file.

    >>> one = csulora.load_adapter(adapter)
    >>> opened = csulora.Subspace.open(subspace)
    >>> limit = undo_limit([one], opened, csulora.Policy.none())
    >>> _, report = csulora.correct(one, opened, csulora.Policy.none(max_total_undo=limit))
    >>> 0 < limit - report.totals.undo < 1e-5
    True
    """
    totals = [correct(adapter, subspace, policy)[1].totals.undo for adapter in adapters]
    return round(max(totals), 6) + _ROUNDING
