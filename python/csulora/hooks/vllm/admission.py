"""What the guard decides, and what it keeps so that a decision once made is not made again differently."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import torch

from csulora.errors import CsuloraError, RefusedError
from csulora.formats import Adapter, LoraModule, is_finite, peft
from csulora.gate import Gate

logger = logging.getLogger("vllm.csulora")

_PREFIX = "csulora-vllm-"
_LOCK_FILE = ".lock"

_Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True)
class _Verdict:
    """The front end's decision on the files as they were then."""

    signature: _Signature
    largest_rank: int = 0
    error: CsuloraError | None = None


class Admission:
    """Decides on adapters; one per process.

    The front end asks `check` before it passes a request on, and a worker asks `directory` for what to load. Both
    keep what they found for the life of the process: an adapter that vLLM evicts and loads again is the same one,
    even if its files have changed or gone since.
    """

    def __init__(self, gate: Gate) -> None:
        """Start with nothing decided; corrected adapters are kept in a temporary directory (see TMPDIR)."""
        self.gate = gate
        self._lock = threading.Lock()
        self._home, descriptor = _new_home()
        weakref.finalize(self, _remove, self._home, descriptor, os.getpid())
        self._admitted: set[Hashable] = set()
        self._verdicts: dict[Path, _Verdict] = {}
        self._by_content: dict[str, Path] = {}
        self._served: dict[Hashable, tuple[_Signature, Path]] = {}

    def check(self, identity: Hashable, path: Path, dtype: torch.dtype, max_rank: int, reload: bool) -> None:
        """Raise unless an adapter can be corrected to a rank of at most ``max_rank`` and held in ``dtype``.

        The files are read again only if they changed since they were last decided on.

        Args:
            identity: what vLLM knows the adapter by.
            path: where it lies.
            dtype: the type in which vLLM holds adapters.
            max_rank: the largest rank that the server takes.
            reload: decide on the files as they are now, though the adapter was admitted before.

        Raises:
            CsuloraError: why the adapter is not let through.
        """
        with self._lock:
            if identity in self._admitted and not reload:
                return
            signature = _signature(path)
            verdict = self._verdicts.get(path)
            if verdict is None or verdict.signature != signature:
                verdict = self._verdicts[path] = self._judge(path, signature, dtype)
            if verdict.error is not None:
                raise verdict.error
            if verdict.largest_rank > max_rank:
                raise RefusedError(
                    f"{path}: has rank {verdict.largest_rank} after correction, and the server takes {max_rank}; "
                    "raise --max-lora-rank, or set the policy's rank"
                )
            self._admitted.add(identity)

    def directory(self, identity: Hashable, path: Path, dtype: torch.dtype, reload: bool) -> Path:
        """Return a directory with the corrected adapter, cast once from float32 to ``dtype``.

        Args:
            identity: what vLLM knows the adapter by.
            path: where it lies.
            dtype: the type in which vLLM holds adapters.
            reload: use the files as they are now, though the adapter was served before. If they cannot be used,
                the adapter stays as it was: raising in the middle of a request would end the engine.

        Raises:
            CsuloraError: the adapter is refused or malformed, and was never served.
        """
        with self._lock:
            served = self._served.get(identity)
            signature = _signature(path)
            if served is not None and (not reload or served[0] == signature):
                return served[1]
            try:
                directory = self._corrected(path, dtype)
            except Exception:
                if served is None:
                    raise
                logger.exception("csulora: %s cannot be reloaded; what was loaded before stays", path)
                return served[1]
            self._served[identity] = signature, directory
            return directory

    def _judge(self, path: Path, signature: _Signature, dtype: torch.dtype) -> _Verdict:
        try:
            corrected, _ = self.gate.admit(path, peft.read, lambda corrected: _cast(corrected, dtype))
        except CsuloraError as error:
            return _Verdict(signature, error=error)
        return _Verdict(signature, max(module.rank for module in corrected.modules.values()))

    def _corrected(self, path: Path, dtype: torch.dtype) -> Path:
        adapter = self.gate.read(path, peft.read)
        key = f"{adapter.sha256}-{str(dtype).removeprefix('torch.')}"
        if key not in self._by_content:
            directory = self._home / key
            directory.mkdir(exist_ok=True)
            self.gate.admit(
                path,
                lambda _: _cast(adapter, torch.float32),
                lambda corrected: peft.write(_cast(corrected, dtype), directory),
            )
            self._by_content[key] = directory
        return self._by_content[key]


def _new_home() -> tuple[Path, int]:
    """Make a directory, locked for as long as this process lives; remove those of processes that were killed."""
    for home in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), (home / _LOCK_FILE).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home)
    home = Path(mkdtemp(prefix=_PREFIX))
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (home / "lock").rename(home / _LOCK_FILE)  # locked before another process can find it
    return home, descriptor


def _remove(home: Path, descriptor: int, owner: int) -> None:
    os.close(descriptor)
    if os.getpid() == owner:  # not in a process forked from it
        shutil.rmtree(home, ignore_errors=True)


def _cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Round the factors to ``dtype``; one infinity would turn the answers to everybody into NaN.

    Raises:
        RefusedError: a factor does not fit.
    """
    modules = {
        name: LoraModule(module.b.to(dtype), module.a.to(dtype), module.scale, module.is_embedding)
        for name, module in adapter.modules.items()
    }
    for name, module in modules.items():
        if not (is_finite(module.a) and is_finite(module.b)):
            raise RefusedError(
                f"{adapter.path}: {name} is too large for {dtype}, in which the server holds adapters; "
                "scale the adapter down, or serve with a --dtype or --lora-dtype of a larger range"
            )
    return replace(adapter, modules=modules)


def _signature(path: Path) -> _Signature:
    """Identity and times of the files of an adapter; empty if there are none."""
    try:
        files = sorted(path.iterdir())
        states = [(file.name, file.stat()) for file in files if file.suffix in (".json", ".safetensors")]
    except OSError:
        return ()
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states)
