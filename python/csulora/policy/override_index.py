"""Which override of a policy counts for a module: the first whose glob matches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from csulora.errors import InputError
from csulora.policy.globs import matches

_MOST_GLOBS = 1000  # overrides with wildcards, each of which is tried for every module
_GLOB = re.compile(r"[*?\[]")


class OverrideIndex:
    """Finds overrides by their globs; names, of which a policy may have thousands, are found at once."""

    def __init__(self, matching: Sequence[str]) -> None:
        """Index the globs of a policy's overrides, in order.

        Raises:
            InputError: too many have wildcards.
        """
        self._matching = matching
        self._named: dict[str, int] = {}
        self._globs = []
        for at, match in enumerate(matching):
            if _GLOB.search(match):
                self._globs.append(at)
            else:
                self._named.setdefault(match, at)
        if len(self._globs) > _MOST_GLOBS:
            raise InputError(
                f"policy: {len(self._globs)} overrides have wildcards, and at most {_MOST_GLOBS} may; name modules"
            )

    def find(self, module: str) -> int | None:
        """Return which override counts for a module."""
        if not self._matching:
            return None
        ends = (module[at:] for at in range(len(module)) if at == 0 or module[at - 1] == ".")
        found = [self._named[end] for end in ends if end in self._named]
        found += islice((at for at in self._globs if matches(module, self._matching[at])), 1)
        return min(found, default=None)
