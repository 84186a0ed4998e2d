"""How long a model's passes take in bfloat16 on a CPU: as `csulora tune` runs it, as torch does, and in float32.

    python bench/speed/half_precision.py --model DIR [--prompts 4] [--tokens 24] [--repetitions 2]

DIR is any causal model that transformers loads. Where the CPU computes in bfloat16, the first two are the same.
Deviations are those of logits and of the gradient of the embeddings from float32's, relative to their norms.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measuring import save, summary
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from csulora.tuning.half_precision import widen_products

KINDS = {"float32": torch.float32, "csulora, bfloat16": torch.bfloat16, "torch, bfloat16": torch.bfloat16}


def passes(model: Any, tokens: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """The processor's seconds of both passes, the logits, and the gradient of the embeddings."""
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # as a fit passes gradients on a CPU
        begun = time.process_time()
        logits = model(inputs_embeds=inputs, use_cache=False).logits.float()
        between = time.process_time()
        logits.square().mean().backward()
    return {"forward": between - begun, "backward": time.process_time() - between}, logits.detach(), inputs.grad.float()


def main() -> None:
    """Run all kinds in turn, and write times and deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (arguments.prompts, arguments.tokens))
    models = {}
    for kind, dtype in KINDS.items():
        models[kind] = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).requires_grad_(False)
    widen_products(models["csulora, bfloat16"])
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    deviations: dict[str, list[float]] = {}
    for _ in range(arguments.repetitions):
        exact: list[Tensor] = []
        for kind, model in models.items():
            seconds, *found = passes(model, tokens)
            taken[kind].append(seconds)
            exact = exact or found
            deviations[kind] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    cpu = {kind: {part: summary([run[part] for run in runs]) for part in runs[0]} for kind, runs in taken.items()}
    settings = {"prompts": arguments.prompts, "tokens": arguments.tokens}
    save("half_precision", settings | {"cpu_seconds": cpu, "deviations": deviations})


if __name__ == "__main__":
    main()
