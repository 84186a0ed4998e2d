"""What the guard decides, and where it puts what vLLM may load."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import torch

from csulora.adapters.lora import Adapter, LoraModule, is_finite
from csulora.adapters.peft import directory as peft
from csulora.adapters.peft.config import CONFIG_FILE
from csulora.correction.correct import cover
from csulora.errors import CsuloraError, InputError, RefusedError
from csulora.io.files import workplace
from csulora.serving.gate import Gate

_PREFIX = "csulora-vllm-"
_LOCK_FILE = ".lock"
_PUBLISHED = re.compile(r"[0-9a-f]{64}-\w+")

_Signature = tuple[tuple[str, int, int, int, int], ...]


class Admission:
    """Decides on adapters and publishes the corrected ones; the one of a front end decides for all its workers.

    The front end asks `admit`, and passes on the directory that it returns in place of the adapter's path. Workers
    load such directories and nothing else (`check_published`), so that all of them load the same bytes, whatever
    becomes of the original, and what vLLM evicts and loads again is the same adapter. A directory is named after
    what it was made of and never changes, so that vLLM's cached prefixes, which are kept by path, stay true too.

    Directories that were superseded stay until the process ends: a request that waits for its turn may need one.
    """

    def __init__(self, gate: Gate) -> None:
        """Start with nothing decided; directories are made below TMPDIR, which the server's machines must share."""
        self.gate = gate
        self._home, descriptor = _new_home()
        weakref.finalize(self, _remove, self._home, descriptor, os.getpid())
        self._admitted: dict[Hashable, Path] = {}
        self._outcomes: dict[tuple[str, torch.dtype], tuple[_Signature, Path | CsuloraError]] = {}
        self._ranks: dict[Path, int] = {}
        self._judging: dict[tuple[str, torch.dtype], threading.Lock] = {}
        self._publishing = threading.Lock()

    def admit(
        self, identity: Hashable, locate: Callable[[], Path], dtype: torch.dtype, max_rank: int, reload: bool
    ) -> Path:
        """Return a directory with the corrected adapter, cast once from float32 to ``dtype``.

        For an adapter that was admitted before this takes no lock and reads nothing. The files of others are read
        only if they changed since they were last decided on.

        Args:
            identity: what vLLM knows the adapter by.
            locate: finds out where it lies; vLLM may have to download it.
            dtype: the type in which vLLM holds adapters.
            max_rank: the largest rank that the server takes.
            reload: decide on the files as they are now, though the adapter was admitted before.

        Raises:
            CsuloraError: why the adapter is not let through.
        """
        admitted = self._admitted.get(identity)
        if admitted is not None and not reload and _is_complete(admitted):
            return admitted
        path = locate()
        with self._judging.setdefault((str(path), dtype), threading.Lock()):
            directory = self._judge(path, dtype, max_rank)
        if self._ranks[directory] > max_rank:
            raise RefusedError(
                f"{path}: has rank {self._ranks[directory]} after correction, and the server takes {max_rank}; "
                "raise --max-lora-rank, or set the policy's rank"
            )
        if admitted not in (None, directory) and not reload:
            raise RefusedError(
                f"{path}: changed since it was loaded, and {admitted}, which was made of it then, is gone; "
                f"load it again, and keep what cleans up temporary files away from {_PREFIX}*"
            )
        self._admitted[identity] = directory
        return directory

    def _judge(self, path: Path, dtype: torch.dtype, max_rank: int) -> Path:
        signature = _signature(path)
        decided_on, outcome = self._outcomes.get((str(path), dtype), (None, None))
        if decided_on == signature:
            if isinstance(outcome, CsuloraError):
                raise outcome.with_traceback(None)
            if outcome is not None and _is_complete(outcome):
                return outcome
        try:
            directory = self._corrected(path, dtype, max_rank)
        except CsuloraError as error:
            if _follows_from_content(error):
                # Another than ``error``, whose traceback holds the upload's bytes.
                self._outcomes[str(path), dtype] = signature, type(error)(*error.args)
            raise
        self._outcomes[str(path), dtype] = signature, directory
        return directory

    def _corrected(self, path: Path, dtype: torch.dtype, max_rank: int) -> Path:
        """Publish the corrected adapter, unless what the same files were corrected to is there already."""
        with self.gate.decision(path) as decision:
            adapter = decision.read_directory(path)
            self._check_rank(adapter, max_rank)
            directory = self._home / f"{adapter.sha256}-{str(dtype).removeprefix('torch.')}"
            if directory in self._ranks and _is_complete(directory):
                decision.recall()
                return directory
            corrected, _ = decision.correct(_cast(adapter, torch.float32))
            self._publish(_cast(corrected, dtype), directory)
        self._ranks[directory] = max(module.rank for module in corrected.modules.values())
        return directory

    def _check_rank(self, adapter: Adapter, max_rank: int) -> None:
        """Raise `RefusedError` if it is clear before anything is computed that the rank will be too large."""
        policy = self.gate.policy
        if policy.rank == "exact":
            return
        largest = max_rank if policy.rank == "keep" else max(max_rank, policy.rank)
        covered = cover(adapter, self.gate.subspace, policy)
        for name in adapter.modules if policy.uncovered == "keep" else covered:
            module = adapter.modules[name]
            if min(module.rank, *module.shape) > largest:
                raise RefusedError(
                    f"{adapter.path}: {name} has rank {module.rank}, and the server takes {max_rank}; "
                    "raise --max-lora-rank, or set the policy's rank"
                )

    def _publish(self, corrected: Adapter, directory: Path) -> None:
        """Let the directory appear complete; somebody may just be reading one that is there."""
        with self._publishing:
            if _is_complete(directory):
                return
            self._home.mkdir(mode=0o700, exist_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
            with workplace(directory) as place:
                (place / "new").mkdir()
                peft.write(corrected, place / "new")
                (place / "new").rename(directory)


def check_published(directory: Path) -> None:
    """Raise `RefusedError` unless a front end of this user published the directory and it is still complete."""
    try:
        home = directory.parent.lstat()
    except OSError as error:
        raise RefusedError(f"{directory}: not readable: {error}; the server's processes must share TMPDIR") from error
    is_private = stat.S_ISDIR(home.st_mode) and home.st_uid == os.geteuid() and not home.st_mode & 0o077
    is_named = directory.parent.name.startswith(_PREFIX) and _PUBLISHED.fullmatch(directory.name)
    if not (is_private and is_named):
        raise RefusedError(f"{directory}: came by a way on which csulora did not check it; nothing was loaded")
    if not _is_complete(directory):
        raise RefusedError(f"{directory}: is gone; keep what cleans up temporary files away from {_PREFIX}*")


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in (CONFIG_FILE, peft.WEIGHTS_FILE))


def _follows_from_content(error: CsuloraError) -> bool:
    """Whether the same files will be refused again: neither file system nor log nor a deadline had a part in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | subprocess.TimeoutExpired):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, InputError | RefusedError)


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
