"""Whether a server serves the model that the subspace file was made of."""

from __future__ import annotations

import os
from pathlib import Path

from csulora.errors import InputError
from csulora.models.checkpoint import Checkpoint
from csulora.models.identity import compared, which
from csulora.serving.gate import Gate
from csulora.serving.variables import ANY_MODEL_VARIABLE


def check_model(model: str, gate: Gate, revision: str | None = None) -> None:
    """Raise unless the served weights are those of the subspace file's aligned checkpoint; one matrix is compared.

    Raises:
        InputError: they are not, or cannot be read.
    """
    if os.environ.get(ANY_MODEL_VARIABLE) == "1":
        return
    hint = (
        f"serve the subspace file's aligned checkpoint, or set {ANY_MODEL_VARIABLE}=1 if this is a converted copy of it"
    )
    if revision and not Path(model).exists():
        raise InputError(
            f"{model}: csulora cannot compare revision {revision} of it; serve a local directory of that one"
        )
    try:
        checkpoint = Checkpoint.open(model)
    except InputError as error:
        raise InputError(f"{error}; {hint}") from error
    module = compared(gate.subspace)
    if module not in checkpoint.weights:
        raise InputError(f"{model}: has no {module}, which the subspace file covers; {hint}")
    if which(checkpoint, gate.subspace) != "aligned":
        raise InputError(f"{model}: {module} is not what the subspace file was made of; {hint}")
