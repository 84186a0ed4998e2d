"""The strength that a policy has for one adapter, where each that it lets through has one of its own."""

from __future__ import annotations

from dataclasses import replace

from csulora.adapters.lora import Adapter
from csulora.errors import NotAdjustedError
from csulora.policy.policy import Policy


def as_adjusted(policy: Policy, adapter: Adapter) -> Policy:
    """Return the policy as it is for an adapter: with its strength, if the policy has strengths.

    Raises:
        NotAdjustedError: the policy has strengths, and none for this adapter.

    >>> policy = Policy.csulora()
    >>> as_adjusted(policy, csulora.load_adapter(adapter)) is policy
    True
    """
    if not policy.strengths:
        return policy
    strength = policy.strength_of(adapter.sha256)
    if strength is None:
        advice = (
            "find its strength with `csulora adjust`"
            if adapter.files
            else "strengths belong to files, and this is a sum or in memory: correct each adapter from its own"
        )
        raise NotAdjustedError(
            f"{adapter.path}: the policy has strengths for other adapters, and none for this one, sha256 "
            f"{adapter.sha256}; {advice}, or use the policy that theirs were found for"
        )
    return replace(policy, strengths=()).strengthened(strength)
