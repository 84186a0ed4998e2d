"""Corrected GGUF LoRA files, kept so that the same adapter is corrected once.

An entry's name is ``<key>-<sha256 of its bytes>.gguf``; the key is a hash of all that the content depends on.
Entries appear complete under their final names, so processes need no lock: at worst both make the same file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from csulora.adapters.gguf import file as gguf
from csulora.adapters.lora import Adapter
from csulora.errors import CsuloraError, InputError, UnsafeFileError
from csulora.io.files import remove_abandoned, sha256_of_file, workplace
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile
from csulora.serving.decisions import Form
from csulora.serving.gate import Gate
from csulora.subspace.subspace import Subspace


def default_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/csulora/gguf``, which is ``~/.cache/csulora/gguf`` if the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csulora" / "gguf"


class CorrectedCache:
    """A directory of corrected files that only its owner may write."""

    def __init__(self, directory: Path) -> None:
        """Open or create a cache, and remove what killed processes left of entries never finished.

        Raises:
            InputError: the directory cannot be created.
            RefusedError: others could put files into it.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: cannot be created: {error.strerror}") from error
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnsafeFileError(
                f"{directory}: others can write to this cache; use a directory of your own (mode 0700)"
            )
        remove_abandoned(directory)
        self._directory = directory

    def corrected(self, path: Path, base: BaseModel, gate: Gate) -> Path:
        """Return a file with the corrected adapter: one that is there and proves intact, else a new one.

        Args:
            path: the adapter.
            base: the model it is for.
            gate: decides, and records that it did.

        Raises:
            RefusedError, InputError: as `csulora.correct` and `gguf.write` do.
        """
        with gate.decision(path) as decision:
            adapter = decision.read(path, base.path)
            key = _key(adapter, base, gate)
            for entry in sorted(self._directory.glob(f"{key}-*.gguf")):
                if _is_intact(entry, adapter, gate.subspace):
                    decision.recall({str(entry): _promised(entry)}, Form("gguf"))
                    return entry
            with workplace(self._directory / key) as place:
                new = place / "new"
                gguf.write(decision.correct(adapter)[0], new, base)
                sha256 = sha256_of_file(new)
                entry = new.replace(self._directory / f"{key}-{sha256}.gguf")
            decision.delivered({str(entry): sha256}, Form("gguf"))
            return entry


def _key(adapter: Adapter, base: BaseModel, gate: Gate) -> str:
    return hashlib.sha256(f"{adapter.sha256} {base.identity} {gate.fingerprint}".encode()).hexdigest()


def _promised(entry: Path) -> str:
    """Return the sha256 that an entry's name says its bytes have."""
    return entry.stem.rpartition("-")[2]


def _is_intact(entry: Path, adapter: Adapter, subspace: Subspace) -> bool:
    """Whether the bytes are those that the name promises, and say that they were made from these two."""
    try:
        file = GGUFFile.read(entry, gguf.LARGEST_FILE)
        return (
            hashlib.sha256(file.data).hexdigest() == _promised(entry)
            and file.text(gguf.ADAPTER_SHA256) == adapter.sha256
            and file.text(gguf.SUBSPACE_SHA256) == subspace.sha256
        )
    except CsuloraError:
        return False
