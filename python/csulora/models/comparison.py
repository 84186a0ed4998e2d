"""Whether two checkpoints hold the same language model, so that their weights can be subtracted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csulora.errors import InputError
from csulora.models import names
from csulora.models.checkpoint import READABLE, Checkpoint, GGUFCheckpoint


def check_one_model(base: Checkpoint, aligned: Checkpoint) -> None:
    """Raise `InputError` unless both hold the same language model, whatever class wraps it."""
    mixed = isinstance(base, GGUFCheckpoint) != isinstance(aligned, GGUFCheckpoint)
    ours, theirs = (
        checkpoint.gguf_architecture if mixed else _language_model_type(checkpoint) for checkpoint in (base, aligned)
    )
    if ours != theirs:
        raise InputError(
            f"config.json: {'GGUF architecture' if mixed else 'model_type'} is {ours} in base {base.name} and {theirs} "
            f"in aligned {aligned.name}; both must be the same architecture"
        )
    classes = [checkpoint.config.get("architectures") for checkpoint in (base, aligned)]
    if not mixed and base.config.get("model_type") == aligned.config.get("model_type") and classes[0] != classes[1]:
        raise InputError(
            f"config.json: architectures is {classes[0]} in base {base.name} and {classes[1]} in aligned "
            f"{aligned.name}; both must be the same architecture"
        )


def check_comparable(base: Checkpoint, aligned: Checkpoint, base_names: Mapping[str, str]) -> None:
    """Raise `InputError` unless both have these modules, readable and in the same shapes.

    Embeddings and heads may differ in rows.

    Args:
        base: the checkpoint before alignment.
        aligned: the one after it.
        base_names: the modules, name in ``aligned`` -> name in ``base``.
    """
    for module, base_name in base_names.items():
        for here, name, there in ((base, base_name, aligned), (aligned, module, base)):
            if name not in here.weights:
                raise InputError(f"{here.name}: tensor {name}.weight is missing, but {there.name} has it")
            if here.weights[name].dtype not in READABLE:
                raise InputError(
                    f"{here.name}: tensor {name}.weight is {here.weights[name].dtype}, which csulora does not read; "
                    "name the unquantised repository that the checkpoint was made from"
                )
        ours_shape, theirs_shape = base.weights[base_name].shape, aligned.weights[module].shape
        rows_may_differ = names.has_a_row_per_token(module) and ours_shape[1] == theirs_shape[1]
        if ours_shape != theirs_shape and not rows_may_differ:
            raise InputError(
                f"tensor {module}.weight is {list(ours_shape)} in base {base.name} "
                f"and {list(theirs_shape)} in aligned {aligned.name}"
            )


def _language_model_type(checkpoint: Checkpoint) -> Any:
    """Return the model type, or that of the language model within one that also sees or hears."""
    text = checkpoint.config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    return inner or checkpoint.config.get("model_type")
