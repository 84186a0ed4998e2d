"""Where refused uploads go, so that INCOMING holds only what may be served."""

from __future__ import annotations

from pathlib import Path

from csulora.errors import InputError
from csulora.io.files import make_directory, to_json, write_text
from csulora.serving.guard.uploads import REFUSED


class Quarantine:
    """A directory on INCOMING's file system, so that an upload moves at once and whole."""

    def __init__(self, directory: Path, incoming: Path, outgoing: Path) -> None:
        """Create it if it is absent.

        Raises:
            InputError: it lies in INCOMING or OUTGOING, one of them lies in it, or it is on another file system.
        """
        self.directory = directory.resolve()
        for other in (incoming, outgoing):
            if self.directory.is_relative_to(other) or other.is_relative_to(self.directory):
                raise InputError(
                    f"{directory}: quarantine and {other} must not lie inside each other; choose one beside it"
                )
        make_directory(self.directory)
        if self.directory.stat().st_dev != incoming.stat().st_dev:
            raise InputError(f"{directory}: is on another file system than {incoming}; choose one beside that")

    def place(self, name: str, identity: str) -> Path:
        """Where an upload goes that a decision refused."""
        return self.directory / f"{name}.{identity}"

    def take(self, upload: Path, place: Path, record: dict[str, object]) -> None:
        """Move an upload, and write the reason beside it; raises OSError, InputError."""
        write_text(place.with_name(f"{place.name}{REFUSED}"), to_json(record))
        upload.rename(place)
