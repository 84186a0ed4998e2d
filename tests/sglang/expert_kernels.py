"""Experts with LoRA on a CPU, for which SGLang brings no kernel: in PyTorch, on the weights and factors that it loaded.

What comes before stays SGLang's: the adapter's loading, its place in the pool, the mapping of tokens to adapters, the
router.
"""

from typing import Any

import torch
from sglang.srt.lora.layers import FusedMoEWithLoRA


def install() -> None:
    """Put `forward` in the place of SGLang's, in this process."""
    FusedMoEWithLoRA._forward_with_lora = forward


def forward(self: Any, hidden_states: torch.Tensor, topk_output: Any, lora_info: Any, **_: Any) -> torch.Tensor:
    """Return each token's sum over its experts, with the token's adapter applied, (tokens, hidden)."""
    slots = lora_info.token_lora_mapping.tolist()
    w1, w2 = self.base_layer.w13_weight, self.base_layer.w2_weight
    output = torch.zeros_like(hidden_states)
    for token, hidden in enumerate(hidden_states):
        chosen = zip(topk_output.topk_weights[token], topk_output.topk_ids[token].tolist(), strict=True)
        for weight, expert in chosen:
            place = slots[token], expert
            gate, up = (w1[expert] @ hidden + first_update(lora_info, place, hidden)).chunk(2)
            active = torch.nn.functional.silu(gate) * up
            output[token] += weight * (w2[expert] @ active + second_update(lora_info, place, active))
    return output


def first_update(info: Any, place: tuple[int, int], x: torch.Tensor) -> torch.Tensor | int:
    """Return what the factors of gate and up add; both lie in one buffer, at the largest rank's distance."""
    if place[0] < 0:
        return 0
    a = info.gate_up_lora_a_weights[place].chunk(2)  # (rank, in)
    b = info.gate_up_lora_b_weights[place].chunk(2)  # (out, rank)
    return torch.cat([up @ (down @ x) for down, up in zip(a, b, strict=True)])


def second_update(info: Any, place: tuple[int, int], x: torch.Tensor) -> torch.Tensor | int:
    """Return what the factors of the down projection add."""
    if place[0] < 0:
        return 0
    return info.down_lora_b_weights[place] @ (info.down_lora_a_weights[place] @ x)
