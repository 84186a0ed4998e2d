"""The compiled core, imported only after checking that it fits the torch that is loaded.

LibTorch keeps no binary compatibility between minor versions, and a mismatch would show up as an undefined
symbol, if at all. Everything in csulora imports the core from here.
"""

from __future__ import annotations

import torch

from csulora.errors import BuildError

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps csulora"


def check_torch(built: str, loaded: str) -> None:
    """Raise `BuildError` unless a core built against torch ``built`` can run on torch ``loaded``."""
    if built.split(".")[:2] != loaded.split(".")[:2]:
        raise BuildError(
            f"csulora's core was built for torch {built}, but torch {loaded} is loaded; "
            f"install torch {built} or rebuild csulora: {_REBUILD}"
        )


try:
    from csulora._build_info import CUDA, TORCH_VERSION
except ImportError as error:
    raise BuildError(f"csulora's core is not built; build csulora: {_REBUILD}") from error
check_torch(TORCH_VERSION, torch.__version__)
try:
    from csulora import _core
except ImportError as error:
    raise BuildError(f"csulora's core does not load ({error}); rebuild csulora: {_REBUILD}") from error

__all__ = ["CUDA", "TORCH_VERSION", "_core", "check_torch"]
