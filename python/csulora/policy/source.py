"""A policy with where it came from, so that a decision can name the file that was in force."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import tomli_w

from csulora.errors import check_type
from csulora.policy import toml
from csulora.policy.policy import Policy
from csulora.policy.toml import PRESETS


@dataclass(frozen=True)
class PolicySource:
    """A policy, and what identifies it.

    Attributes:
        policy: the policy.
        name: path of its file, or a preset's name; None for a `Policy` that a program made.
        sha256: of the file; of a policy without a file, of ``text``.
        text: a policy's TOML document if it came from no file, else None.
    """

    policy: Policy
    name: str | None
    sha256: str
    text: str | None

    @property
    def file(self) -> Path | None:
        """The policy's file, if it came from one."""
        return Path(self.name) if self.name and self.text is None else None

    @classmethod
    def load(cls, source: Policy | str | Path | None) -> Self:
        """Read a file once, so that the bytes that are hashed are the bytes that count; or take a preset or policy.

        Raises:
            InputError: there is no such preset or file, the file is malformed, or there is no policy at all.
        """
        if isinstance(source, str | Path) and source not in PRESETS:
            path = Path(source)
            data = toml.data_of(path)
            return cls(Policy.parse(data, path), str(path.absolute()), hashlib.sha256(data).hexdigest(), None)
        name = None if isinstance(source, Policy | None) else str(source)
        policy = Policy.load(name) if name else check_type(source, Policy, "policy")
        text = tomli_w.dumps(policy.to_dict())
        return cls(policy, name, hashlib.sha256(text.encode()).hexdigest(), text)
