"""The finished modules of an extraction that is under way, so that an interrupted run continues where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.files import atomic_directory, atomic_file, check_file, remove_abandoned, save_tensors, to_json
from csulora.subspace import FACTORS, ModuleSubspace

_RUN_FILE = "run.json"


class Parts:
    """The directory ``<output>.partial``: one file per finished module, and what they are computed from."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        """Continue the run that left its parts beside ``output`` if its ``identity`` is the same; else start afresh.

        Raises:
            InputError: ``output`` cannot be written, or something else has the name of the directory.
        """
        check_file(output)
        self.directory = _directory(output)
        run, text = self.directory / _RUN_FILE, to_json(identity)
        if run.is_file():
            if run.read_bytes() == text.encode():
                return
            self.remove()
        with atomic_directory(self.directory, marker=_RUN_FILE) as directory:
            (directory / _RUN_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def of_first_rank(cls, output: Path) -> Parts:
        """Join the run that the first rank has opened beside ``output``.

        Raises:
            InputError: its directory is not seen from here.
        """
        parts = cls.__new__(cls)
        parts.directory = _directory(output)
        if not (parts.directory / _RUN_FILE).is_file():
            raise InputError(
                f"{parts.directory}: made by the first rank, and not seen by this one; "
                "choose an output on a file system that all ranks share"
            )
        return parts

    def finished(self, module: str) -> bool:
        """Whether the module needs no more computing."""
        return self._file(module).is_file()

    def save(self, name: str, module: ModuleSubspace) -> None:
        """Keep a finished module."""
        factors = {factor: getattr(module, factor) for factor in FACTORS}
        with atomic_file(self._file(name)) as temporary:
            save_tensors(factors, temporary, {"record": json.dumps(module.record(), allow_nan=False)})

    def load(self, name: str) -> ModuleSubspace:
        """Map a finished module."""
        try:
            with safe_open(self._file(name), framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                return ModuleSubspace.from_record(record, {factor: file.get_tensor(factor) for factor in FACTORS})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.directory}: cannot be continued ({error}); remove it") from error

    def remove(self) -> None:
        """Forget the run."""
        remove_abandoned(self.directory)
        remove_abandoned(self.directory.parent, self.directory.name)
        for file in self.directory.glob("*"):
            if file.name != _RUN_FILE:  # removed last: it says that the directory is csulora's
                file.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, module: str) -> Path:
        return self.directory / f"{hashlib.sha256(module.encode()).hexdigest()}.safetensors"


def _directory(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")
