"""Which upload a guard was deciding on when it was killed: that one comes last, and after three times not at all.

An upload whose reading takes more memory than a service may have would else end every guard that begins with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular
from csulora.serving.uploads import Signature

_MOST_TIMES = 3
_LARGEST = 1 << 12  # bytes


class Interrupted:
    """A file that is there while an upload is decided on, and that tells the next guard if this one was killed."""

    def __init__(self, file: Path) -> None:
        """Read what a guard before this one left behind."""
        self._file = file
        self._upload, self._times = "", 0
        with suppress(InputError):
            left = parse_json(read_regular(file, _LARGEST), file)
            if isinstance(left.get("upload"), str) and isinstance(left.get("times"), int):
                self._upload, self._times = left["upload"], left["times"]

    def times(self, name: str, signature: Signature) -> int:
        """How often in a row guards were killed while they decided on an upload."""
        return self._times if self._upload == _identity(name, signature) else 0

    def is_hopeless(self, name: str, signature: Signature) -> bool:
        """Whether that happened so often that the upload is to be refused."""
        return self.times(name, signature) >= _MOST_TIMES

    @contextmanager
    def deciding(self, name: str, signature: Signature) -> Iterator[None]:
        """Leave a trace of the upload if the process is killed within the block."""
        document = {"upload": _identity(name, signature), "times": self.times(name, signature) + 1}
        with suppress(OSError):
            self._file.write_text(json.dumps(document))
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        """Leave no trace: whoever ends this process does so on purpose."""
        with suppress(OSError):
            self._file.unlink()


def _identity(name: str, signature: Signature) -> str:
    return hashlib.sha256(repr((name, signature)).encode(errors="backslashreplace")).hexdigest()
