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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import csulora
from csulora.hooks import peft as hook
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance
from csulora.subspace.subspace import Subspace

RANK, DIRECTIONS = 16, 64
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    width: int
    hidden: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers with their (out, in)."""
        narrow = self.width // self.heads * self.key_value_heads
        kinds = {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (narrow, self.width),
            "self_attn.v_proj": (narrow, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.hidden, self.width),
            "mlp.up_proj": (self.hidden, self.width),
            "mlp.down_proj": (self.width, self.hidden),
        }
        return {f"model.layers.{i}.{kind}": size for i in range(self.layers) for kind, size in kinds.items()}


SHAPES = {
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shape(2, 128, 256, 4, 2, 256),
}


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


def make_subspace(shape: Shape, path: Path) -> Subspace:
    """Write a subspace file of random subspaces, the same for modules of one shape, and open it."""

    def orthonormal(rows: int) -> torch.Tensor:
        basis: torch.Tensor = torch.linalg.qr(torch.randn(rows, min(DIRECTIONS, rows)))[0]
        return basis.half()

    bases = {rows: orthonormal(rows) for size in shape.modules().values() for rows in size}
    certificate = Certificate(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, DIRECTIONS, 1)
    modules = {}
    for name, (rows, columns) in shape.modules().items():
        k = min(DIRECTIONS, rows, columns)
        u, v = bases[rows][:, :k].contiguous(), bases[columns][:, :k].contiguous()
        modules[name] = ModuleSubspace(u, torch.linspace(1.0, 0.1, k), v, certificate, "0" * 64, "1" * 64)
    Subspace(modules, Provenance(csulora.__version__, "random", "random", {}, {})).save(path)
    return Subspace.open(path)


def make_adapter(shape: Shape, directory: Path, dtype: torch.dtype) -> Path:
    """Write a random adapter for every linear layer."""
    tensors = {}
    for name, (rows, columns) in shape.modules().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(RANK, columns) / columns**0.5).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (0.01 * torch.randn(rows, RANK)).to(dtype)
    directory.mkdir()
    targets = sorted({name.rpartition(".")[2] for name in shape.modules()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


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
