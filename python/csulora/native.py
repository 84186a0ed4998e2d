"""The compiled core that fits the torch that is loaded. Everything in csulora imports the core from here.

Raises:
    BuildError: on import, if this installation carries no core for that torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from csulora import cores

if TYPE_CHECKING:
    from csulora import _core
else:
    _core = cores.load(torch.__version__, Path(torch.__file__).parent)

__all__ = ["_core"]
