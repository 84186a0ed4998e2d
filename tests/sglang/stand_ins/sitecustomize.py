"""Lets SGLang's server run where there is no GPU: what it asks of one, and needs no more than memory for.

Every process that has this folder on PYTHONPATH imports this module. Pinned memory becomes ordinary memory. Beside it
lies a module `vllm`, from which SGLang imports a kernel for rotary embeddings that it does not call on a CPU.
"""

import functools
from collections.abc import Callable

import torch


def _unpinned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def made(*args, pin_memory: bool = False, **options) -> torch.Tensor:
        return function(*args, **options)

    return made


for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
    setattr(torch, name, _unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, device=None: self
