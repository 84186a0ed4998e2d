"""The finished modules of an extraction that is under way, so that an interrupted run continues where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.files import atomic_file, check_parent, to_json, write_text
from csulora.subspace import Certificate, ModuleSubspace

_FACTORS = ("u", "s", "v")


class Parts:
    """The directory ``<output>.partial``: one file per finished module, and what they were computed from."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        """Continue the run that left its parts beside ``output`` if its ``identity`` is the same; else start afresh.

        Raises:
            InputError: ``output`` cannot be created.
        """
        check_parent(output)
        self._directory = output.with_name(f"{output.name}.partial")
        state = self._directory / "run.json"
        if not state.is_file() or state.read_text(encoding="utf-8") != to_json(identity):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir()
            write_text(state, to_json(identity))

    def finished(self, module: str) -> bool:
        """Whether the module needs no more computing."""
        return self._file(module).is_file()

    def save(self, name: str, module: ModuleSubspace) -> None:
        """Keep a finished module."""
        tensors = {factor: getattr(module, factor).contiguous() for factor in _FACTORS}
        with atomic_file(self._file(name)) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"provenance": json.dumps(module.provenance())})

    def load(self, name: str) -> ModuleSubspace:
        """Map a finished module."""
        try:
            with safe_open(self._file(name), framework="pt") as tensors:
                provenance = json.loads(tensors.metadata()["provenance"])
                certificate = Certificate.from_record(provenance.pop("certificate"))
                factors = {factor: tensors.get_tensor(factor) for factor in _FACTORS}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._directory}: cannot be continued ({error}); remove it") from error
        return ModuleSubspace(**factors, certificate=certificate, **provenance)

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self._directory)

    def _file(self, module: str) -> Path:
        return self._directory / f"{hashlib.sha256(module.encode()).hexdigest()}.safetensors"
