"""Experts with LoRA on a CPU, for which vLLM brings no kernel: in PyTorch, on the weights and factors that vLLM loaded.

vLLM chooses its Triton kernels for experts wherever LoRA is enabled, and those need a device. What comes before them
stays vLLM's: the adapter's loading, its layout, scale and slot, the mapping of tokens to adapters, the router.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts


def install() -> None:
    """Put `apply` in the place of vLLM's."""
    TritonExperts.apply = apply


def apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    *_: Any,
    **options: Any,
) -> None:
    """Write each token's sum over its experts, with the token's adapter applied, to ``output`` (tokens, hidden)."""
    context = self._lora_context
    slots = context.punica_wrapper.token_lora_indices.tolist()
    for token, hidden in enumerate(hidden_states):
        slot = slots[token] if token < len(slots) else -1
        output[token] = 0
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            both = product(w1[expert], self.w1_bias, expert, hidden)
            both += update(context.w13_lora_a_stacked, context.w13_lora_b_stacked, slot, expert, hidden)
            active = activated(both, activation)
            down = product(w2[expert], self.w2_bias, expert, active)
            down += update(context.w2_lora_a_stacked, context.w2_lora_b_stacked, slot, expert, active)
            output[token] += weight * down


def product(matrix: torch.Tensor, bias: torch.Tensor | None, expert: int, x: torch.Tensor) -> torch.Tensor:
    return matrix @ x if bias is None else matrix @ x + bias[expert]


def update(
    a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], slot: int, expert: int, x: torch.Tensor
) -> torch.Tensor | int:
    """Return what the factors in a slot, (slots, experts, rank, in) and (slots, experts, out, rank), add."""
    if slot < 0:
        return 0
    return torch.cat([up[slot, expert] @ (down[slot, expert] @ x) for down, up in zip(a, b, strict=True)])


def activated(both: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    """Return the activation of gate and up: side by side with SiLU, or gpt-oss's, in which they alternate."""
    if activation == MoEActivation.SILU:
        gate, up = both.chunk(2)
        return torch.nn.functional.silu(gate) * up
    assert activation == MoEActivation.SWIGLUOAI
    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)
