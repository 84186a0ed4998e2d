"""Time that correction adds to loading one adapter in PEFT, as a ratio to PEFT's own load in the same run.

    python bench/speed/peft_load.py [--shape llama-3-8b|tiny] [--repeats 5] [--json FILE]

The adapter is LoRA of rank 16 on all linear layers, in the given storage type; the subspace file has 64 directions per
module, and is open, hashed and validated before the first load, as it is in a server. The model has the real number of
layers and the real shapes, but its weights are zeros that share one entry: loading an adapter reads only their shapes,
types and devices. Plain and guarded loads alternate in one process, each into a fresh wrapper of the model; the first
of each is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from shapes import DIRECTIONS, RANK, SHAPES, Shape, make_adapter, make_subspace
from transformers import LlamaConfig, LlamaForCausalLM

import csulora
from csulora.hooks import peft as hook

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def make_model(shape: Shape) -> LlamaForCausalLM:
    """Build the model without memory for its weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.bfloat16).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    model.eval()
    return model


def timed_load(model: LlamaForCausalLM, adapter: Path) -> tuple[float, torch.Tensor]:
    """Load the adapter into a fresh wrapper; return the seconds and one of its B factors."""
    start = time.perf_counter()
    wrapped = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    seconds = time.perf_counter() - start
    factor = next(p.detach().clone() for name, p in wrapped.named_parameters() if "lora_B" in name)
    wrapped.unload()
    del wrapped
    gc.collect()
    return seconds, factor


def measure(shape: Shape, dtype: torch.dtype, repeats: int, work: Path) -> dict[str, object]:
    """Time plain and guarded loads in turn; check first that the guarded one gives what `correct` gives."""
    model, subspace = make_model(shape), make_subspace(shape, work / "subspace.safetensors")
    adapter = make_adapter(shape, work / "adapter", dtype)
    fixed, _ = csulora.correct(csulora.load_adapter(adapter), subspace, csulora.Policy.csulora())
    expected = fixed.modules["model.layers.0.self_attn.q_proj"].b.float()
    times: dict[str, list[float]] = {"plain": [], "guarded": []}
    for _ in range(repeats + 1):
        seconds, raw = timed_load(model, adapter)
        times["plain"].append(seconds)
        with hook.guard(subspace, csulora.Policy.csulora()):
            seconds, corrected = timed_load(model, adapter)
        times["guarded"].append(seconds)
        if not torch.equal(corrected, expected) or torch.equal(raw, expected):
            raise SystemExit("the guarded load does not give the corrected adapter")
    plain, guarded = (statistics.median(times[kind][1:]) for kind in ("plain", "guarded"))
    return {
        "modules": len(shape.modules()),
        "adapter_mib": round((adapter / "adapter_model.safetensors").stat().st_size / 2**20, 1),
        "subspace_mib": round((work / "subspace.safetensors").stat().st_size / 2**20, 1),
        "plain_seconds": [round(value, 4) for value in times["plain"][1:]],
        "guarded_seconds": [round(value, 4) for value in times["guarded"][1:]],
        "median_plain_seconds": round(plain, 4),
        "median_guarded_seconds": round(guarded, 4),
        "added_ratio": round(guarded / plain - 1, 3),
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="storage type of the adapter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        figures = measure(SHAPES[arguments.shape], DTYPES[arguments.dtype], arguments.repeats, Path(work))
    document = {
        "benchmark": "peft_load",
        "shape": arguments.shape,
        "adapter_dtype": arguments.dtype,
        "rank": RANK,
        "directions": DIRECTIONS,
        **figures,
        "versions": {name: version(name) for name in ("csulora", "torch", "peft", "transformers")},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
