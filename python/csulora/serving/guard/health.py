"""How a guard is, in a file that probes read: fresh while it lives, ``"ready": true`` once it has seen all uploads."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from csulora.io.files import check_file


class HealthFile:
    """A file that is written every second while the guard lives, and removed when it stops."""

    def __init__(self, path: Path) -> None:
        """Raise `InputError` unless the file could be written."""
        check_file(path)
        self._path, self._new = path, path.with_name(f".{path.name}.new")

    def write(self, state: dict[str, Any]) -> None:
        """Say how the guard is; a file system that does not take it stops nothing."""
        document = {"time": datetime.now(UTC).isoformat(), "pid": os.getpid()} | state
        with suppress(OSError):
            self._new.write_text(json.dumps(document) + "\n")
            self._new.replace(self._path)

    def remove(self) -> None:
        """Leave no file of a guard that has stopped."""
        for file in (self._path, self._new):
            with suppress(OSError):
                file.unlink(missing_ok=True)
