"""The compiled cores that this installation carries: one per minor version of torch.

LibTorch promises no binary compatibility between minor versions. A core that does not fit is never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import csulora
from csulora.errors import BuildError

_NAME = re.compile(r"_core_(\d+)_(\d+)")


def minor(version: str) -> str:
    """Return what two versions of torch must share: ``2.13`` for ``2.13.0+cpu``."""
    return ".".join(version.split(".")[:2])


def carried() -> list[str]:
    """Return the minor versions of torch that there is a core for, the lowest first."""
    found = [_NAME.fullmatch(module.name) for module in iter_modules(csulora.__path__)]
    return [f"{major}.{minor}" for major, minor in sorted((int(name[1]), int(name[2])) for name in found if name)]


def load(torch_version: str, torch_directory: Path) -> ModuleType:
    """Import the core for ``torch_version``, which is loaded from ``torch_directory``.

    Raises:
        BuildError: there is no core for that torch, or it does not load.
    """
    wanted, there = minor(torch_version), carried()
    build = build_command(torch_directory)
    if not there:
        raise BuildError(f"csulora's core is not built; build it in csulora's source tree: {build}")
    if wanted not in there:
        raise BuildError(
            f"csulora carries a core for torch {_listed(there)}, but torch {torch_version} is loaded; "
            f"install a torch that fits: pip install 'torch=={there[-1]}.*'; "
            f"or build a core for this one in csulora's source tree: {build}"
        )
    try:
        core = import_module(f"csulora._core_{wanted.replace('.', '_')}")
    except ImportError as error:
        raise BuildError(
            f"csulora's core for torch {wanted} does not load ({error}); build it in csulora's source tree: {build}"
        ) from error
    if minor(core.TORCH_VERSION) != wanted:
        raise BuildError(
            f"csulora's core for torch {wanted} was built against torch {core.TORCH_VERSION}; "
            f"build it in csulora's source tree: {build}"
        )
    return core


def build_command(torch_directory: Path) -> str:
    """Return the command that builds a core for one torch and leaves that torch alone."""
    return f"pip install --no-deps --config-settings cmake.define.CSULORA_TORCH_DIR={torch_directory} ."


def _listed(versions: Sequence[str]) -> str:
    *others, last = versions
    return f"{', '.join(others)} and {last}" if others else last
