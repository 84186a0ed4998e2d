"""What identifies the embeddings and heads of a checkpoint, of which adapters hold copies."""

from __future__ import annotations

from csulora.models import names
from csulora.models.checkpoint import Checkpoint
from csulora.subspace.provenance import StoredMatrix

_PLAIN_DTYPES = ("F16", "BF16", "F32")  # PEFT saves a copy dequantised, if at all


def stored_vocabulary(checkpoint: Checkpoint) -> dict[str, StoredMatrix]:
    """Hash the embeddings and heads of a checkpoint that are stored as floating point, by name; aliases too."""
    found = {
        module: StoredMatrix(weight.dtype, weight.shape, checkpoint.load(module)[1])
        for module, weight in checkpoint.weights.items()
        if names.kind_of(module) != "linear" and weight.dtype in _PLAIN_DTYPES and not weight.transposed
    }
    return found | {alias: found[module] for alias, module in checkpoint.aliases.items() if module in found}
