"""What a tuned policy was made from, as far as its file says so."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Self

from csulora.errors import InputError

HASH_DIGITS = 16  # of a prompt's sha256: enough to recognise it, too few to be a commitment
_MOST_PROMPTS = 1 << 20


@dataclass(frozen=True)
class PolicyProvenance:
    """Where a tuned policy comes from; it decides nothing about a correction.

    Attributes:
        prompts: a hash of every prompt that it was fitted to or chosen by, see `csulora.tuning.probes.prompt_hash`.
            `csulora evaluate` refuses to measure a policy on them.
        verdict: what `csulora tune` said of the policy, in a sentence; empty where nothing is known.
        beats_plain_scaling: whether its figures lie above those of plain scaling; None where nothing is known.

    >>> PolicyProvenance(("0123456789abcdef",)).to_dict()
    {'prompts': ['0123456789abcdef']}
    """

    prompts: tuple[str, ...] = ()
    verdict: str = ""
    beats_plain_scaling: bool | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.prompts, tuple) or len(self.prompts) > _MOST_PROMPTS:
            raise InputError(f"policy provenance: prompts must be a list of at most {_MOST_PROMPTS} hashes")
        for each in self.prompts:
            if not isinstance(each, str) or not re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", each):
                raise InputError(f"policy provenance: {each!r} is no hash of {HASH_DIGITS} hexadecimal digits")
        if not isinstance(self.verdict, str) or not isinstance(self.beats_plain_scaling, bool | None):
            raise InputError("policy provenance: verdict must be a text, and beats_plain_scaling true or false")

    def to_dict(self) -> dict[str, Any]:
        """Return it as its TOML table, without what is empty."""
        document = {
            "verdict": self.verdict or None,
            "beats_plain_scaling": self.beats_plain_scaling,
            "prompts": list(self.prompts) or None,
        }
        return {key: value for key, value in document.items() if value is not None}

    @classmethod
    def from_dict(cls, table: Any) -> Self:
        """Read it from its TOML table; raises `InputError` for anything else."""
        if not isinstance(table, dict) or not isinstance(table.get("prompts", []), list):
            raise InputError("policy provenance: must be a table with a list of prompts")
        if unknown := set(table) - {each.name for each in fields(cls)}:
            raise InputError(f"policy provenance: unknown field {min(unknown)!r}; `csulora tune` writes none such")
        return cls(**table | {"prompts": tuple(table.get("prompts", []))})
