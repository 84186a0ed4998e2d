"""Controls that a policy must beat: plain scaling, and the same policy in directions that know less."""

from __future__ import annotations

from typing import Any

from csulora.adapters.lora import Adapter
from csulora.correction.controls.comparison import compared
from csulora.correction.controls.subspaces import other_layers, own_subspaces, random_subspaces
from csulora.correction.correct import correct, cover
from csulora.correction.report import Report
from csulora.policy.overrides import Override
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace


def scaling_policy(factor: float, **rest: Any) -> Policy:
    """Return the policy X = factor dW, for a factor in [0, 1]; ``rest`` are a policy's other fields.

    >>> scaling_policy(0.5).overrides[0].gains
    (0.5, 0.5, 0.5, 0.5)
    """
    return Policy.none(overrides=(Override("*", gains=(factor,) * 4),), **rest)


def scaling(adapter: Adapter, subspace: Subspace, factor: float) -> tuple[Adapter, Report]:
    """Multiply the whole update by one factor in [0, 1].

    Returns:
        The scaled adapter, in the input's storage types, and its report, measured in ``subspace``.

    Raises:
        InputError, RefusedError: the factor is out of range, or the adapter does not fit ``subspace``.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> scaled, report = scaling(lora, found, 0.5)
    >>> round(report.totals.relative_change, 3)
    0.5
    """
    fixed, _ = correct(adapter, subspace, scaling_policy(factor))
    return compared(adapter, fixed, subspace, {"control": "scaling", "factor": factor})


def random_subspace(adapter: Adapter, subspace: Subspace, policy: Policy, seed: int = 0) -> tuple[Adapter, Report]:
    """Apply a policy in uniformly random directions, as many per module as ``subspace`` has.

    Returns:
        The changed adapter, in the input's storage types, and its report, measured in ``subspace`` itself.

    Raises:
        InputError, RefusedError: as `csulora.correct` does; a policy for one subspace file alone is refused.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> _, report = random_subspace(lora, found, Policy.project(), seed=1)
    >>> report.policy["control"], report.policy["seed"]
    ('random subspace', 1)
    """
    fixed, _ = correct(adapter, random_subspaces(subspace, seed), policy)
    return compared(adapter, fixed, subspace, {"control": "random subspace", "seed": seed, **policy.to_dict()})


def other_layer(adapter: Adapter, subspace: Subspace, policy: Policy) -> tuple[Adapter, Report]:
    """Apply a policy in the directions of the same kind of module one layer on.

    Returns:
        The changed adapter, in the input's storage types, and its report, measured in ``subspace`` itself.

    Raises:
        InputError, RefusedError: as `csulora.correct` does, or modules of one kind differ in shape.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> _, report = other_layer(lora, found, Policy.protect(1.0))
    >>> report.policy["control"]
    'other layer'
    """
    fixed, _ = correct(adapter, other_layers(subspace), policy)
    return compared(adapter, fixed, subspace, {"control": "other layer", **policy.to_dict()})


def own_subspace(adapter: Adapter, subspace: Subspace, policy: Policy) -> tuple[Adapter, Report]:
    """Apply a policy in the leading directions of the adapter's own update, at most as many as ``subspace`` has.

    Returns:
        The changed adapter, in the input's storage types, and its report, measured in ``subspace`` itself.

    Raises:
        InputError, RefusedError: as `csulora.correct` does; a policy for one subspace file alone is refused.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> _, report = own_subspace(lora, found, Policy.protect(1.0))
    >>> report.policy["control"]
    'own subspace'
    """
    own = own_subspaces(subspace, adapter, cover(adapter, subspace, policy))
    fixed, _ = correct(adapter, own, policy)
    return compared(adapter, fixed, subspace, {"control": "own subspace", **policy.to_dict()})
