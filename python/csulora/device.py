"""Where to compute: on the CPU or on a GPU."""

from __future__ import annotations

import torch

from csulora.errors import InputError
from csulora.native import _core


def resolve(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means; ``auto`` is a GPU if one can be used.

    Raises:
        InputError: there is no such device, or this build of csulora or torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if gpu_usable() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InputError(f"device {name!r}: use auto, cpu, cuda or cuda:N")
    if not _core.CUDA:
        raise InputError(
            f"device {name!r}: this build of csulora computes on the CPU; use auto or cpu, or build with CUDA"
        )
    if not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch finds no GPU; use auto or cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def assign_gpu(process: int) -> None:
    """Make one of this machine's GPUs the current one; its processes, counted from 0, get one each in turn."""
    if gpu_usable():
        torch.cuda.set_device(process % torch.cuda.device_count())


def gpu_usable() -> bool:
    """Whether csulora was built with CUDA and torch finds a GPU."""
    return _core.CUDA and torch.cuda.is_available()
