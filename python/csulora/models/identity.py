"""Which of the two checkpoints that a subspace file was made of a model is; one matrix is compared."""

from __future__ import annotations

from typing import Literal

from csulora.models.checkpoint import Checkpoint
from csulora.subspace.subspace import Subspace

Which = Literal["aligned", "base", "another"]


def compared(subspace: Subspace) -> str:
    """Return the module whose matrix is compared: a small one that alignment moved, if it moved any."""
    moved = [name for name, module in subspace.items() if module.base_sha256 != module.aligned_sha256]
    return min(moved or subspace, key=lambda name: subspace[name].u.numel() + subspace[name].v.numel())


def which(checkpoint: Checkpoint, subspace: Subspace) -> Which:
    """Return which checkpoint has this content; a converted copy is another.

    Raises:
        InputError: the checkpoint cannot be read.

    >>> from csulora.models.checkpoint import Checkpoint
    >>> which(Checkpoint.open(aligned), csulora.Subspace.open(subspace))
    'aligned'
    """
    module = compared(subspace)
    if module not in checkpoint.weights:
        return "another"
    sha256 = checkpoint.load(module)[1]
    if sha256 == subspace[module].aligned_sha256:
        return "aligned"
    return "base" if sha256 == subspace[module].base_sha256 else "another"
