"""How the model that a policy is fitted to is loaded: on one device or spread over several, whole or quantised."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csulora.errors import InputError
from csulora.io.hub import hub_id, local_path
from csulora.tuning.half_precision import widen_products

_BITS = {"8bit", "4bit"}
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "tekken.json")  # names of tokenizers' files
_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers


@dataclass(frozen=True)
class Loading:
    """Where a model runs, and how its weights are stored there.

    Attributes:
        device: ``cpu``, ``cuda`` or ``auto``, a GPU if torch finds one.
        device_map: spreads the model over devices, in place of ``device``: what transformers takes as ``device_map``.
            That is ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``, or module -> device.
        load_in: ``8bit`` or ``4bit`` quantises the linear layers with bitsandbytes.

    Raises:
        InputError: ``device`` is given with ``device_map``, or ``load_in`` is neither.

    >>> Loading(device="cpu", device_map="auto")
    Traceback (most recent call last):
    csulora.errors.InputError: device 'cpu' and a device map exclude each other; give one of them
    """

    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    load_in: str | None = None

    def __post_init__(self) -> None:
        """Check that nothing is asked for with its contrary."""
        if self.device_map is not None and self.device != "auto":
            raise InputError(f"device {self.device!r} and a device map exclude each other; give one of them")
        if self.load_in is not None and self.load_in not in _BITS:
            raise InputError(f"load_in {self.load_in!r}: use 8bit or 4bit")

    @property
    def is_placed(self) -> bool:
        """Whether the weights are placed as they are loaded, and may not be moved as a whole."""
        return self.device_map is not None or self.load_in is not None


def load(path: str, loading: Loading) -> tuple[Any, Any]:
    """Return the model in a directory or hub id, and its tokenizer, as transformers loads them.

    A hub id may name a revision and a folder, see `local_path`.

    Raises:
        InputError: transformers, accelerate or bitsandbytes is needed and not installed, transformers does not load
            the whole model, or there is no such device.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError("csulora runs the model through transformers; pip install 'csulora[peft]'") from error
    _check_installed(loading)
    source, named = _located(path)
    device = _device(loading.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **named)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            **named,
            **_placement(source, named, loading, device),
        )
    except Exception as error:  # transformers raises what each model's code does
        raise InputError(f"{path}: transformers does not load this model: {' '.join(str(error).split())}") from error
    model, loaded = opened
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(f"{path}: {missing[0]} is missing, and {len(missing) - 1} more weights of this model")
    if loading.load_in == "4bit":
        _keep_gradients(model)
    if not loading.is_placed:  # else layers have forward passes of accelerate's or bitsandbytes' own
        model = model.to(device)
        widen_products(model)
    return model, tokenizer


def _located(path: str) -> tuple[str, dict[str, str]]:
    """Return what transformers calls a model: its directory or repository, and the revision and folder that are meant.

    Raises `InputError` if there is no such model, or a directory in which transformers would find none.
    """
    directory = Path(path)
    if not directory.is_dir():
        local_path(path, ["config.json"])  # transformers tries an absent hub again and again, and logs that
        repo, revision, inside = hub_id(path) or (path, None, "")
        return repo, {name: value for name, value in (("revision", revision), ("subfolder", inside)) if value}
    if not (directory / "config.json").exists():
        raise InputError(f"{directory}: holds no config.json; name the aligned model's directory first, then adapters")
    if not any(file for pattern in _TOKENIZERS for file in directory.glob(pattern)):
        raise InputError(f"{directory}: holds no tokenizer; save the model's there, with tokenizer.save_pretrained")
    return path, {}


def _check_installed(loading: Loading) -> None:
    if loading.device_map is not None:
        _require("accelerate", "--device-map")
    if loading.load_in is not None:
        _require("accelerate", f"--load-in {loading.load_in}")
        _require("bitsandbytes", f"--load-in {loading.load_in}")


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"{option} needs {package}, which is not installed; pip install {package}")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here; use --device cpu")
    return name


def _placement(source: str, named: Mapping[str, str], loading: Loading, device: str) -> dict[str, Any]:
    """Return the arguments that say where transformers places the weights, and in how many bits."""
    if not loading.is_placed:
        return {}
    spread = {"": device} if loading.device_map is None else loading.device_map
    return {
        "device_map": spread if isinstance(spread, str) else dict(spread),
        "quantization_config": _quantization(loading.load_in, source, named) if loading.load_in else None,
    }


def _quantization(load_in: str, source: str, named: Mapping[str, str]) -> Any:
    """Return transformers' configuration of bitsandbytes; 4-bit products compute in the checkpoint's own type."""
    from transformers import AutoConfig, BitsAndBytesConfig

    if load_in == "8bit":
        # It says at every product that int8 products take float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = AutoConfig.from_pretrained(source, **named).get_text_config().dtype or torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _keep_gradients(model: nn.Module) -> None:
    """Forbid the packed weights of some CPUs, through which bitsandbytes passes no gradient."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            if not hasattr(module, _PACKS):
                raise InputError(f"{name}: this version of bitsandbytes is unknown; pip install 'bitsandbytes==0.50.2'")
            setattr(module, _PACKS, False)
