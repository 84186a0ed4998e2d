"""Where corrected adapters lie that a server's processes may load: private directories named after their content."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

import torch

from csulora.adapters.lora import Adapter
from csulora.adapters.peft import directory as peft
from csulora.adapters.weights_files import CONFIG_FILE, hashes_as_written
from csulora.errors import RefusedError
from csulora.io.files import naming, sha256_of_file

PREFIX = "csulora-serving-"  # of the directories below TMPDIR
_LOCK_FILE = ".lock"
_FILES = (CONFIG_FILE, peft.WEIGHTS_FILE)
_PUBLISHED = re.compile(r"[0-9a-f]{64}-\w+")


class Publication:
    """The corrected adapters of one front end, below TMPDIR, which the server's machines must share.

    A directory is named after what it was made of and never changes. It stays until the process ends: a request that
    waits for its turn may need one that was superseded.
    """

    def __init__(self) -> None:
        """Make a directory of this process's own."""
        self._home, descriptor = _new_home()
        weakref.finalize(self, _remove, self._home, descriptor, os.getpid())
        self._publishing = threading.Lock()

    def directory(self, adapter: Adapter, dtype: torch.dtype) -> Path:
        """Return where the corrected form of an adapter lies, or will lie."""
        return self._home / f"{adapter.sha256}-{str(dtype).removeprefix('torch.')}"

    def holds(self, directory: Path) -> bool:
        """Whether a path is one of this publication's, whether or not anything is there."""
        return directory.parent == self._home and _PUBLISHED.fullmatch(directory.name) is not None

    def publish(self, corrected: Adapter, directory: Path, hashed: bool = True) -> Mapping[str, str]:
        """Let the directory appear complete; somebody may just be reading one that is there.

        Returns:
            Path -> sha256 of each of its files; empty if nobody wants them ``hashed``.
        """
        with self._publishing:
            if is_complete(directory):
                return {str(directory / name): sha256_of_file(directory / name) for name in _FILES if hashed}
            self._home.mkdir(mode=0o700, exist_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
            # What a killed process leaves of it goes with its home.
            new = Path(mkdtemp(prefix=".", dir=self._home))
            try:
                with naming(directory):
                    tensors = peft.write(corrected, new)
                    hashes = hashes_as_written(new / peft.WEIGHTS_FILE, tensors) if hashed else {}
                    new.rename(directory)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            return {str(directory / name): sha256 for name, sha256 in hashes.items()}


def check_published(directory: Path) -> None:
    """Raise `RefusedError` unless a front end of this user published the directory and it is still complete."""
    try:
        home = directory.parent.lstat()
    except OSError as error:
        raise RefusedError(f"{directory}: not readable: {error}; the server's processes must share TMPDIR") from error
    is_private = stat.S_ISDIR(home.st_mode) and home.st_uid == os.geteuid() and not home.st_mode & 0o077
    is_named = directory.parent.name.startswith(PREFIX) and _PUBLISHED.fullmatch(directory.name)
    if not (is_private and is_named) or directory.is_symlink():
        raise RefusedError(f"{directory}: came by a way on which csulora did not check it; nothing was loaded")
    if not is_complete(directory):
        raise RefusedError(f"{directory}: is gone; keep what cleans up temporary files away from {PREFIX}*")


def is_complete(directory: Path) -> bool:
    """Whether a published directory holds all that hosts read."""
    return all((directory / name).is_file() for name in _FILES)


def _new_home() -> tuple[Path, int]:
    """Make a directory, locked for as long as this process lives; remove those of processes that were killed."""
    for home in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), (home / _LOCK_FILE).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home)
    home = Path(mkdtemp(prefix=PREFIX))
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (home / "lock").rename(home / _LOCK_FILE)  # locked before another process can find it
    return home, descriptor


def _remove(home: Path, descriptor: int, owner: int) -> None:
    os.close(descriptor)
    if os.getpid() == owner:  # not in a process forked from it
        shutil.rmtree(home, ignore_errors=True)
