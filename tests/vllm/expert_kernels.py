"""Experts with LoRA on a CPU, for which vLLM brings no kernel: in PyTorch, on the weights and factors that vLLM loaded.

vLLM chooses its Triton kernels for experts wherever LoRA is enabled, and those need a device. What comes before them
stays vLLM's: the adapter's loading, its layout, scale and slot, the mapping of tokens to adapters, the router.
"""

from typing import Any

import torch
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
    activation: Any,
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
            both = w1[expert] @ hidden + updates(context.w13_lora_a_stacked, context.w13_lora_b_stacked, slot, expert)(
                hidden
            )
            active = torch.empty(1, self.adjust_N_for_activation(both.numel(), activation), dtype=both.dtype)
            self.activation(activation, active, both[None])
            down = updates(context.w2_lora_a_stacked, context.w2_lora_b_stacked, slot, expert)(active[0])
            output[token] += weight * (w2[expert] @ active[0] + down)


def updates(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], slot: int, expert: int) -> Any:
    """Return what the factors in a slot (slots, experts, rank, in), (slots, experts, out, rank) add to an input."""
    if slot < 0:
        return lambda x: 0
    return lambda x: torch.cat([up[slot, expert] @ (down[slot, expert] @ x) for down, up in zip(a, b, strict=True)])
