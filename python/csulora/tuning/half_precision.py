"""Products of weights in half precision on CPUs that have no instructions for it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn


class _WideProduct(torch.autograd.Function):
    """x W^T + bias, multiplied in float32 and rounded once; only W itself is kept for the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        wide = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


def widen_products(model: nn.Module) -> None:
    """Let the frozen linear layers of a model multiply in float32 where torch would emulate half precision.

    A weight stays as it is stored, and is widened for each product. On a CPU with AVX2 alone, torch takes 3 times as
    long for a product in bfloat16 as for one in float32, and over 30 times for its gradient. Hardware for bfloat16 adds
    in float32, too.

    >>> layer = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    >>> widen_products(layer)
    >>> layer(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """
    for module in model.modules():
        if type(module) is nn.Linear and _is_emulated(module.weight):
            # In place of the method, not of the layer: its name, its weight and its hooks stay.
            module.forward = partial(_wide_forward, module)  # type: ignore[method-assign]


def _wide_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if layer.weight.requires_grad or x.dtype != layer.weight.dtype or not _is_emulated(layer.weight):
        return nn.functional.linear(x, layer.weight, layer.bias)
    product: Tensor = _WideProduct.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return product


def _is_emulated(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and emulates(weight.dtype)


@cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether torch has kernels of this CPU for products, but no instructions for those of a type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
