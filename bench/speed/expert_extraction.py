"""Extraction of experts of Qwen3-30B-A3B's shapes, from disk in a warm page cache, against batched `svd_lowrank`.

    python bench/speed/expert_extraction.py [--experts 128] [--repetitions 3] [--suffix S]

Writes bfloat16 model pairs of one layer and of two, with 128 experts and three projections each, to a temporary
directory (7.5 GB), removed after. Spectra fall, or have sixteen values above a bulk. The peer is
`torch.svd_lowrank` with q = k + 8 and 4 iterations on batches of matrices that are in memory already, in float32.
Ratios are those of medians in one run. Peak memory is that of processes of their own.
Writes bench/results/speed/expert_extraction.json, with a suffix for another kind of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import interleaved, save
from safetensors.torch import save_file
from torch import Tensor

import csulora
from csulora.extraction.model_pair import ModelPair

SHAPES = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False}
RANK, PEER_OVERSAMPLING, PEER_ITERATIONS, PEER_BATCH = 16, 8, 4, 16
LAYERS = (1, 2)
MOST_GROWTH = 1.1
_PEAK = (
    "import resource, sys, csulora; csulora.extract(sys.argv[1], sys.argv[2], output=sys.argv[3]);"
    "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('VmHWM', 'RssAnon'))][0])"
)


def displacement(shape: tuple[int, int], kind: str, generator: torch.Generator) -> Tensor:
    """Return what alignment might add to a matrix, far above bfloat16's rounding: (m, n) float32."""
    rows, columns = shape
    values = 20 * (torch.arange(1, 65).rsqrt() if kind == "falling" else torch.linspace(3, 1.2, RANK))
    left = torch.randn(rows, len(values), generator=generator) / rows**0.5
    right = torch.randn(len(values), columns, generator=generator) / columns**0.5
    change: Tensor = (left * values) @ right
    if kind == "bulk":
        change += 20 * torch.randn(rows, columns, generator=generator) / (rows**0.5 + columns**0.5)
    return change


def write_model_pair(directory: Path, layers: int, experts: int, kind: str) -> tuple[Path, Path]:
    """Write a base and an aligned checkpoint, a file per layer."""
    generator = torch.Generator().manual_seed(0)
    paths = directory / "base", directory / "aligned"
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(CONFIG))
    for layer in range(layers):
        base, aligned = {}, {}
        for expert in range(experts):
            for projection, shape in SHAPES.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                base[name] = (0.02 * torch.randn(*shape, generator=generator)).bfloat16()
                aligned[name] = (base[name].float() + displacement(shape, kind, generator)).bfloat16()
        for path, weights in zip(paths, (base, aligned), strict=True):
            save_file(weights, path / f"model-{layer + 1:05}-of-{layers:05}.safetensors", {"format": "pt"})
    return paths


def displacements(base: Path, aligned: Path) -> list[Tensor]:
    """Return the matrices D of a pair, those of one shape in batches: (batch, m, n) float32."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    model_pair = ModelPair.open(base, aligned)
    for batch in model_pair.load_ahead(model_pair.modules, None):
        for loaded in batch:
            change = loaded.task.aligned.float() - loaded.task.base.float()
            found.setdefault(tuple(change.shape), []).append(change)
    return [chunk for same in found.values() for chunk in torch.split(torch.stack(same), PEER_BATCH)]


def peer(batches: list[Tensor]) -> float:
    """Run the peer; return the energy that it captures."""
    captured = 0.0
    for batch in batches:
        _, values, _ = torch.svd_lowrank(batch, RANK + PEER_OVERSAMPLING, PEER_ITERATIONS)
        captured += float(values[:, :RANK].double().square().sum())
    return captured


def energy(subspace: csulora.Subspace) -> float:
    """Return the energy that a subspace file captures."""
    return sum(float(module.s.double().square().sum()) for module in subspace.values())


def peak_megabytes(base: Path, aligned: Path, output: Path) -> float:
    """Return the peak resident memory of an extraction in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, base, aligned, output], check=True, capture_output=True, text=True
    )
    return int(done.stdout) / 1024


def measure(experts: int, kind: str, repetitions: int) -> dict[str, Any]:
    """Measure one kind of spectrum."""
    with tempfile.TemporaryDirectory() as scratch:
        pairs = {layers: write_model_pair(Path(scratch, str(layers)), layers, experts, kind) for layers in LAYERS}
        base, aligned = pairs[1]
        batches, output = displacements(base, aligned), Path(scratch, "subspace.safetensors")
        captured = peer(batches), energy(csulora.extract(base, aligned, output=output))
        extract = partial(csulora.extract, base, aligned, output=output)
        runs: dict[str, Callable[[], object]] = {"svd_lowrank": partial(peer, batches), "csulora": extract}
        times = interleaved(runs, repetitions)
        size = output.stat().st_size
        peaks = {layers: peak_megabytes(*pair, Path(scratch, "other")) for layers, pair in pairs.items()}
    return {
        "matrices": experts * len(SHAPES),
        "times": times,
        "speed": times["svd_lowrank"]["median"] / times["csulora"]["median"],
        "captured": captured[1] / captured[0],
        "peak_megabytes": {str(layers): round(peak) for layers, peak in peaks.items()},
        "bytes_per_matrix": size / experts / len(SHAPES),
    }


def main() -> None:
    """Measure both kinds of spectrum and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    found = {kind: measure(arguments.experts, kind, arguments.repetitions) for kind in ("falling", "bulk")}
    print(json.dumps(found, indent=2))
    save(f"expert_extraction{arguments.suffix}", {"load_average": os.getloadavg()[0], **found})


if __name__ == "__main__":
    main()
