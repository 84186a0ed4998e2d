"""Regular expressions from untrusted files, matched exactly as PEFT matches them and within a time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from csulora.errors import InputError, RefusedError, TooLargeError

Row = list[str | None]
"""One entry per name: None where the pattern does not match, else what the template's group holds, or nothing."""

_GROUP = "idx"

_SECONDS = 5  # for all patterns of a file together
_TOO_SLOW = "its patterns take too long to match; use fewer, and plain names"
_LONGEST = 10_000  # characters; generated patterns that name every kind of layer have some hundreds

# Names, dots and anchors alone cannot backtrack for long.
_PLAIN = re.compile(r"(?:[\w\-.^$]|\\\.)*")

# A match in `re` cannot be interrupted, and another engine would read some patterns differently. So what is not
# plain is matched by a process of its own, which can be stopped.
_MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # also where whoever started this was killed
patterns, names, group = json.load(sys.stdin)
rows = [[re.match(pattern, name) for name in names] for pattern in patterns]
json.dump([[match and (match[group] if group else "") for match in row] for row in rows], sys.stdout)
"""


class Matcher:
    """Matches names against the patterns of one file; all of them together have a few seconds."""

    def __init__(self, path: Path) -> None:
        """Start the clock for the file ``path``."""
        self._path = path
        self._deadline = time.monotonic() + _SECONDS

    def match_all(self, keys: Sequence[str], template: str, names: Sequence[str]) -> list[Row]:
        """Match names against patterns, ``re.match(template with a key in place of {}, name)``.

        Args:
            keys: regular expressions found in the file.
            template: the regular expression around each key.
            names: module names, without line breaks.

        Returns:
            A row per key.

        Raises:
            InputError: a key is no regular expression.
            RefusedError: a key is too long, or matching takes too long.
        """
        if any(len(key) > _LONGEST for key in keys):
            raise TooLargeError(
                f"{self._path}: a pattern is longer than {_LONGEST} characters; name the modules plainly"
            )
        patterns = {key: template.replace("{}", key) for key in keys}
        group = _GROUP if f"(?P<{_GROUP}>" in template else ""  # a key's own groups hold whatever it wants
        plain = {key: self._match_here(patterns[key], names, group) for key in patterns if _PLAIN.fullmatch(key)}
        others = [key for key in patterns if key not in plain]
        apart = self._match_apart([patterns[key] for key in others], names, group) if others and names else []
        rows = plain | dict(zip(others, apart, strict=True))
        return [rows[key] for key in keys]

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise RefusedError(f"{self._path}: {_TOO_SLOW}") from TimeoutError()  # tells that it may pass another time
        return left

    def _match_here(self, pattern: str, names: Sequence[str], group: str) -> Row:
        self._seconds_left()
        matches = map(re.compile(pattern).match, names)
        return [match and (match[group] if group else "") for match in matches]

    def _match_apart(self, patterns: Sequence[str], names: Sequence[str], group: str) -> list[Row]:
        try:
            finished = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MATCHER],
                input=json.dumps([patterns, names, group]),
                capture_output=True,
                text=True,
                timeout=self._seconds_left(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RefusedError(f"{self._path}: {_TOO_SLOW}") from None
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"{self._path}: a pattern cannot be used as a regular expression ({reason})")
        rows: list[Row] = json.loads(finished.stdout)
        return rows
