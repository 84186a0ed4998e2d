"""What a policy refuses of adapters that fit: undo and annihilation beyond its limits."""

from __future__ import annotations

from collections.abc import Mapping

from csulora.adapters.lora import Adapter
from csulora.correction.report import Report
from csulora.errors import AnnihilationLimitError, UndoLimitError
from csulora.policy.policy import Policy

_ADVICE = "do not load it, or raise that in the policy if you trust the adapter"


def _beyond(share: float, limit: float) -> str:
    """Write a share with three decimals, or with as many as tell it from its limit."""
    return f"{share:.3f}" if f"{share:.3f}" != f"{limit:.3f}" else f"{share:.6f}"


def check_limits(adapter: Adapter, report: Report, policy: Policy, covered: Mapping[str, str]) -> None:
    """Check an update, as it came, against a policy's limits; ``covered`` maps its modules to the subspace file's.

    Raises:
        RefusedError: it exceeds one, or nobody can say.
    """
    _check_undo(adapter, report, policy, covered)
    total = report.totals.undo
    if policy.max_total_undo is not None and total > policy.max_total_undo:
        raise UndoLimitError(
            f"{adapter.path}: all modules together undo {_beyond(total, policy.max_total_undo)} of their alignment; "
            f"the policy allows {policy.max_total_undo:g} (max_total_undo); {_ADVICE}"
        )
    if policy.min_annihilation_ratio is not None:
        _check_annihilation(adapter, report, policy.min_annihilation_ratio)


def _check_undo(adapter: Adapter, report: Report, policy: Policy, covered: Mapping[str, str]) -> None:
    """Raise `RefusedError` if a module undoes too much, or the two names of a tied weight do when they are merged."""
    if policy.max_undo is None:
        return
    undone = {module.module: module.undo or 0.0 for module in report.measured}
    names_of: dict[str, list[str]] = {}
    for name in undone:
        names_of.setdefault(covered[name], []).append(name)
    undone |= {" and ".join(both): sum(undone[name] for name in both) for both in names_of.values()}
    worst = max(undone, key=lambda name: undone[name])
    if undone[worst] > policy.max_undo:
        raise UndoLimitError(
            f"{adapter.path}: module {worst} undoes {_beyond(undone[worst], policy.max_undo)} of its alignment; "
            f"the policy allows {policy.max_undo:g} (max_undo); {_ADVICE}"
        )


def _check_annihilation(adapter: Adapter, report: Report, limit: float) -> None:
    if not report.knows_annihilation:
        raise AnnihilationLimitError(
            f"{adapter.path}: the policy asks for an annihilation ratio of {limit:g} or more, and it is unknown here; "
            "give the aligned checkpoint (--aligned-model, or aligned= in Python), use a subspace file that "
            "`csulora extract --sketch` made, or take the limit from the policy"
        )
    worst = report.worst_annihilation
    if worst is not None and worst.annihilation_ratio is not None and worst.annihilation_ratio < limit:
        about = "" if worst.annihilation_interval is None else "about "
        raise AnnihilationLimitError(
            f"{adapter.path}: module {worst.module} removes a direction that the aligned matrix writes: annihilation "
            f"ratio {about}{worst.annihilation_ratio:.1e}; the policy asks for {limit:g} or more"
        )
    if report.annihilation_unknown:
        name = report.annihilation_unknown[0]
        raise AnnihilationLimitError(
            f"{adapter.path}: the policy asks for an annihilation ratio of {limit:g} or more, and it is unknown for "
            f"module {name}: the subspace file has no sketch of it, or one that is too small for rank "
            f"{adapter.modules[name].rank}; give the aligned checkpoint, or extract again with a larger --sketch"
        )
