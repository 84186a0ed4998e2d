"""The finished modules of an extraction that is under way, so that an interrupted run continues where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from csulora.errors import InputError
from csulora.io.files import (
    LOCK_FILE,
    WORKPLACE_SUFFIX,
    atomic_file,
    check_file,
    locked,
    parse_json,
    read_regular,
    remove_abandoned,
    to_json,
    write_text,
)
from csulora.io.tensors import save_tensors
from csulora.subspace.module_subspace import FACTORS, SKETCH, ModuleSubspace

FORMAT_VERSION = 3

_RUN_FILE = "run.json"
_RECORDS = "records"  # key of a file's metadata
_OWN_FILE = re.compile(rf"{re.escape(_RUN_FILE)}|{LOCK_FILE}|[0-9a-f]{{64}}\.safetensors|\..*{WORKPLACE_SUFFIX}")
_LARGEST_RUN = 16 << 20  # bytes


class PartialRun:
    """The directory ``<output>.partial``: one file per batch of finished modules, and what they are computed from."""

    def __init__(self, output: Path) -> None:
        """Know where the run is; `create` and `join` look what is there."""
        self.directory = output.with_name(f"{output.name}.partial")
        self._owned = ExitStack()
        self._places: dict[str, Path] = {}

    @classmethod
    def create(cls, output: Path, identity: dict[str, Any]) -> Self:
        """Own the run, and continue what lies beside ``output`` if its ``identity`` is the same; else start afresh.

        Raises:
            InputError: ``output`` cannot be written, something else has the name of the directory, it is of another
                format, or another run is writing there.
        """
        check_file(output)
        run = cls(output)
        if run.directory.is_symlink() or (run.directory.exists() and not run.directory.is_dir()):
            raise InputError(f"{run.directory}: is no directory of csulora's; remove it or choose another name")
        run.directory.mkdir(exist_ok=True)
        run._check_own()
        run._check_format()
        try:
            run._owned.enter_context(locked(run.directory))
        except (BlockingIOError, FileNotFoundError):  # the other one, finished, has removed it
            raise InputError(f"{output}: another run is writing it; wait for that, or name another") from None
        run._open(to_json({"format": FORMAT_VERSION, **identity}))
        return run

    @classmethod
    def join(cls, output: Path) -> Self:
        """Write to the run that the first process owns.

        Raises:
            InputError: its directory is not seen from here.
        """
        run = cls(output)
        if not (run.directory / _RUN_FILE).is_file():
            raise InputError(
                f"{run.directory}: made by the first process, and not seen by this one; "
                "choose an output on a file system that all processes share"
            )
        return run

    def _check_own(self) -> None:
        """Raise `InputError` if the directory holds what csulora did not write."""
        for file in self.directory.iterdir():
            if not _OWN_FILE.fullmatch(file.name):
                raise InputError(
                    f"{self.directory}: holds {file.name}, which csulora did not write; "
                    "remove it or choose another name"
                )

    def _check_format(self) -> None:
        """Raise `InputError` if the directory holds a run that another csulora left."""
        run = self.directory / _RUN_FILE
        with suppress(InputError):  # no run, or none that can be continued
            found = parse_json(read_regular(run, _LARGEST_RUN), run).get("format")
            if found == FORMAT_VERSION:
                return
        if run.is_file():
            raise InputError(
                f"{self.directory}: a partial run of another format than {FORMAT_VERSION}; remove it and extract again"
            )

    def _open(self, identity: str) -> None:
        run = self.directory / _RUN_FILE
        if run.is_file() and run.read_bytes() == identity.encode():
            self._look()
            return
        self._remove_files()
        write_text(run, identity)

    def __enter__(self) -> Self:
        """Return the partial run; the block is the run."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another run have its modules."""
        self._owned.close()

    def finished(self, module: str) -> bool:
        """Whether the module needs no more computing, as far as this object knows."""
        return module in self._places

    def save(self, modules: Mapping[str, ModuleSubspace]) -> None:
        """Keep finished modules, all of them or none."""
        file = self.directory / f"{hashlib.sha256(min(modules).encode()).hexdigest()}.safetensors"
        factors = {
            f"{name}.{factor}": tensor
            for name, module in modules.items()
            for factor, tensor in module.tensors().items()
        }
        records = json.dumps({name: module.record() for name, module in modules.items()}, allow_nan=False)
        with atomic_file(file) as temporary:
            save_tensors(factors, temporary, {_RECORDS: records})
        self._places |= dict.fromkeys(modules, file)

    def load(self) -> dict[str, ModuleSubspace]:
        """Map all finished modules, also those of other processes."""
        self._look()
        return {name: module for file in sorted(set(self._places.values())) for name, module in self._read(file)}

    def _look(self) -> None:
        """Learn which modules are finished."""
        files = [file for file in self.directory.iterdir() if file.suffix == ".safetensors"]
        self._places = {name: file for file in files for name in self._records(file)}

    def _records(self, file: Path) -> dict[str, Any]:
        with self._explained(), safe_open(file, framework="pt") as opened:
            records: dict[str, Any] = json.loads(opened.metadata()[_RECORDS])
            return records

    def _read(self, file: Path) -> Iterator[tuple[str, ModuleSubspace]]:
        with self._explained(), safe_open(file, framework="pt") as opened:
            for name, record in self._records(file).items():
                found = set(opened.keys())
                names = [factor for factor in (*FACTORS, SKETCH) if f"{name}.{factor}" in found]
                factors = {factor: opened.get_tensor(f"{name}.{factor}") for factor in names}
                yield name, ModuleSubspace.from_record(record, factors)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.directory}: cannot be continued ({error}); remove it") from error

    def remove(self) -> None:
        """Forget the run."""
        self._remove_files()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_files(self) -> None:
        if not self.directory.is_dir():
            return
        remove_abandoned(self.directory)
        for file in self.directory.iterdir():
            if file.name != LOCK_FILE:
                file.unlink(missing_ok=True)
