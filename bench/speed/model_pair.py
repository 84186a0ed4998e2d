"""`csulora.extract` of a model pair of Llama-3-8B's shapes, 4 layers, from disk in a warm page cache, against floors.

    python bench/speed/model_pair.py [--layers 4] [--spectrum bulk] [--repetitions 3] [--suffix S]

Writes two bfloat16 checkpoints (3.5 GB together) to a temporary directory, removed after. The compute floor is the
operations of the algorithm at the rate of a large float32 product; the read floor is the time of reading both files.
The spectrum falls, or 16 directions stand out of a bulk above rounding.
Writes bench/results/speed/extraction_model_pair.json, `..._bulk.json` for a bulk, with a suffix for another CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bulk import displacement
from measuring import GEMM_FLOPS, LLAMA_3_8B, gemm, interleaved, read_files, save
from safetensors.torch import save_file
from torch import Tensor

import csulora
from extraction import RANK, operations

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SIGNALS = 256


def moved(weight: Tensor, generator: torch.Generator, spectrum: str) -> Tensor:
    """Return what alignment might make of a weight, far above bfloat16's rounding."""
    rows, columns = weight.shape
    if spectrum == "bulk":
        bulk: Tensor = (weight.float() + displacement(rows, columns, RANK, spectrum)).bfloat16()
        return bulk
    left = torch.randn(rows, SIGNALS, generator=generator) / rows**0.5
    right = torch.randn(SIGNALS, columns, generator=generator) / columns**0.5
    values = 20 * torch.arange(1, SIGNALS + 1).rsqrt()
    result: Tensor = (weight.float() + (left * values) @ right).bfloat16()
    return result


def write_model_pair(directory: Path, layers: int, spectrum: str) -> list[Path]:
    """Write both checkpoints; returns their directories."""
    generator = torch.Generator().manual_seed(0)
    base, aligned = {}, {}
    for layer in range(layers):
        for name, shape in LLAMA_3_8B.items():
            weight = (0.02 * torch.randn(*shape, generator=generator)).bfloat16()
            tensor = f"model.layers.{layer}.{name}.weight"
            base[tensor], aligned[tensor] = weight, moved(weight, generator, spectrum)
    directories = []
    for name, weights in (("base", base), ("aligned", aligned)):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(CONFIG))
        save_file(weights, directory / name / "model.safetensors", {"format": "pt"})
        directories.append(directory / name)
    return directories


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--spectrum", choices=("falling", "bulk"), default="falling")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, aligned = write_model_pair(Path(scratch), arguments.layers, arguments.spectrum)
        subspace = csulora.extract(base, aligned, rank=RANK)
        files = [directory / "model.safetensors" for directory in (base, aligned)]
        times = interleaved(
            {
                "gemm": gemm(),
                "read": lambda: read_files(*files),
                "extract": lambda: csulora.extract(base, aligned, rank=RANK),
            },
            arguments.repetitions,
        )
    # `operations` takes the longer side as rows; products with a matrix and its transpose cost the same.
    flops = sum(
        operations(module.shape[0] * module.shape[1] // 4096, module.certificate.passes) for module in subspace.values()
    )
    rate = GEMM_FLOPS / times["gemm"]["median"]
    floor = max(flops / rate, times["read"]["median"])
    results = {
        "layers": arguments.layers,
        "rank": RANK,
        "kept": sorted({module.rank for module in subspace.values()}),
        "passes": sorted({module.certificate.passes for module in subspace.values()}),
        "largest_subspace_error_bound": max(module.certificate.subspace_error for module in subspace.values()),
        "seconds": times,
        "compute_floor": flops / rate,
        "read_floor": times["read"]["median"],
        "multiple_of_floor": times["extract"]["median"] / floor,
    }
    kind = "_bulk" if arguments.spectrum == "bulk" else ""
    save(f"extraction_model_pair{kind}{arguments.suffix}", results)


if __name__ == "__main__":
    main()
