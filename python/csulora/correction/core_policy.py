"""Policies as the compiled core takes them."""

from __future__ import annotations

from csulora.native import _core
from csulora.policy.policy import Policy


def attenuation(policy: Policy, module: str) -> _core.Penalties | _core.Components | _core.Directions:
    """Return the penalties, gains or directions of a module, by its name in the subspace file."""
    override = policy.override_of(module)
    if override is None:
        return _core.Penalties(policy.aligned, policy.partial, policy.off)
    if override.penalties is not None:
        return _core.Penalties(*override.penalties)
    if override.gains is not None:
        return _core.Components(*override.gains)
    assert override.directions is not None
    return _core.Directions(override.directions.left, override.directions.right, override.directions.reinforced)


def core_options(policy: Policy) -> _core.CorrectionOptions:
    """Return what holds for all modules of an adapter."""
    if isinstance(policy.rank, int):
        return _core.CorrectionOptions(_core.RankRule.fixed, policy.rank, policy.reference_energy)
    rule = _core.RankRule.keep if policy.rank == "keep" else _core.RankRule.exact
    return _core.CorrectionOptions(rule, reference_energy=policy.reference_energy)
