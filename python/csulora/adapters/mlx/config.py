"""mlx-lm's ``adapter_config.json``: what says which update the adapter is, and what is refused and why.

mlx-lm reads three fields: ``fine_tune_type``, ``num_layers`` and ``lora_parameters``. The others are the arguments of
the training, which it stores beside them. A field that is not known is refused unless it is null or false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from csulora.adapters.peft.config import base_model_name
from csulora.errors import InputError, NotPlainLoraError

_LARGEST_RANK = 2**31 - 1
_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys", "alpha"})  # mlx-lm takes no notice of an alpha
# The arguments of mlx-lm's training, and what older versions called them.
_TRAINING = frozenset(
    {
        "model",
        "data",
        "hf_dataset",
        "train",
        "test",
        "config",
        "adapter_path",
        "resume_adapter_file",
        "trust_remote_code",
        "optimizer",
        "optimizer_config",
        "learning_rate",
        "lr_schedule",
        "seed",
        "batch_size",
        "iters",
        "val_batches",
        "test_batches",
        "save_every",
        "steps_per_report",
        "steps_per_eval",
        "max_seq_length",
        "grad_checkpoint",
        "grad_accumulation_steps",
        "clear_cache_threshold",
        "mask_prompt",
        "report_to",
        "project_name",
        "wandb",
        "use_chat_template",
        "prompt_feature",
        "completion_feature",
    }
)
_OTHER_TYPES = {
    "dora": "DoRA also rescales the weight's rows",
    "full": "whole weights were trained and are replaced",
}
_READ = frozenset({"fine_tune_type", "num_layers", "lora_parameters"})


@dataclass(frozen=True)
class Settings:
    """What a configuration says of the update: ``dW = scale * (lora_a @ lora_b)^T``, of one rank.

    ``keys`` are names of modules, whole or within a layer; None stands for whatever the layers hold.
    """

    rank: int
    scale: float
    keys: frozenset[str] | None
    base_model: str | None
    layers: int  # the last ones of the model; all of them if it is not positive

    def selects(self, module: str) -> bool:
        """Whether mlx-lm makes room for an update of this module."""
        if self.keys is None:
            return True
        parts = module.split(".")
        return any(".".join(parts[start:]) in self.keys for start in range(len(parts)))


def read_config(config: dict[str, Any], path: Path) -> Settings:
    """Let through what describes plain LoRA and nothing else.

    Raises:
        RefusedError: the configuration describes something that is not a plain low-rank update.
        InputError: a field is missing or has a value that mlx-lm does not know.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        reason = _OTHER_TYPES.get(str(kind), "csulora does not know it")
        raise NotPlainLoraError(f"{path}: fine_tune_type is {kind!r}: {reason}; only lora can be corrected")
    layers = config.get("num_layers")
    if not _is_whole(layers):
        hint = "; older versions of mlx-lm called it lora_layers, rename it" if "lora_layers" in config else ""
        raise InputError(f"{path}: num_layers is {layers!r}; it must be a whole number{hint}")
    for field in sorted(config.keys() - _READ - _TRAINING):
        if config[field] is not None and config[field] is not False:
            raise NotPlainLoraError(
                f"{path}: csulora does not know the field {field!r}, which may change what the adapter does; "
                "remove it if it has no effect, or use a csulora that knows it"
            )
    return _settings(config.get("lora_parameters"), base_model_name(config.get("model")), layers, path)


def written_config(rank: int, modules: list[str], base_model: str | None) -> dict[str, Any]:
    """Return a configuration of scale 1, whose keys name every module in full, so that the layers need no count."""
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": modules}
    return {"fine_tune_type": "lora", "lora_parameters": parameters, "model": base_model, "num_layers": -1}


def _settings(parameters: Any, base_model: str | None, layers: int, path: Path) -> Settings:
    if not isinstance(parameters, dict):
        raise InputError(f"{path}: lora_parameters is {parameters!r}; mlx-lm writes an object there")
    if unknown := sorted(parameters.keys() - _PARAMETERS):
        raise NotPlainLoraError(
            f"{path}: csulora does not know lora_parameters.{unknown[0]}, which may change the update"
        )
    rank, scale, keys = (parameters.get(name) for name in ("rank", "scale", "keys"))
    if not _is_whole(rank) or not 1 <= rank <= _LARGEST_RANK:
        raise InputError(f"{path}: lora_parameters.rank is {rank!r}; it must be a whole number from 1")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(_as_float(scale)):
        raise InputError(f"{path}: lora_parameters.scale is {scale!r}; it must be a finite number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise InputError(f"{path}: lora_parameters.keys must be null or a list of names")
    return Settings(rank, float(scale), None if keys is None else frozenset(keys), base_model, layers)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # a whole number beyond all floats
        return math.inf
