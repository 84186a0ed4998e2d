"""What a run of `tune` or `evaluate` has finished, so that an interrupted one continues where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from csulora.errors import InputError
from csulora.io.files import check_file, parse_json, read_regular, remove_abandoned, to_json, write_text

FORMAT_VERSION = 2
_LARGEST_FILE = 256 << 20  # bytes


class Stages:
    """The file ``<output>.partial``: the result of every finished stage, and what the run is made from."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        """Continue the run that left its file beside ``output`` if its ``identity`` is the same; else start afresh.

        Raises:
            InputError: ``output`` cannot be written, or the file is not csulora's, or of another format.
        """
        check_file(output)
        self.path = output.with_name(f"{output.name}.partial")
        self._document: dict[str, Any] = {"format": FORMAT_VERSION, "identity": identity, "results": {}}
        if self.path.exists():
            document = parse_json(read_regular(self.path, _LARGEST_FILE), self.path)
            if set(document) - {"format"} != {"identity", "results"} or not isinstance(document["results"], dict):
                raise InputError(f"{self.path}: is in the way, and not what an unfinished run leaves there; remove it")
            if document.get("format") != FORMAT_VERSION:
                raise InputError(
                    f"{self.path}: stages of another format than {FORMAT_VERSION}; remove it and run the command again"
                )
            if document["identity"] == identity:
                self._document = document

    def finish(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returned, now or in a run that was interrupted: something that JSON can hold.

        >>> stages = Stages(Path("policy.toml"), identity={"seed": 0})
        >>> stages.finish("fit", lambda: [0.5])
        [0.5]
        >>> Stages(Path("policy.toml"), identity={"seed": 0}).finish("fit", lambda: [0.7])
        [0.5]
        """
        results = self._document["results"]
        if name not in results:
            results[name] = compute()
            write_text(self.path, to_json(self._document))
        return results[name]

    def remove(self) -> None:
        """Forget the run."""
        self.path.unlink(missing_ok=True)
        remove_abandoned(self.path.parent, self.path.name)
