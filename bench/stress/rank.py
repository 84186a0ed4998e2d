"""Time and memory of reading, correcting and writing an adapter of one module, by the rank of its factors.

    python bench/stress/rank.py [--repetitions 3] [--json FILE] [--plot FILE]

Ranks run from 4 to 4000 on a 128 x 128 and a 4096 x 4096 matrix, in float16, each in a process of its own. A rank is
above what an uploader may honestly need long before it is large for a file: neither time nor memory may grow as its
square or cube there. An adapter that is refused counts with the time that the refusal takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from inputs import gaussian
from safetensors.torch import save_file

import csulora
from csulora.native import _core
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.provenance import Provenance
from csulora.subspace.subspace import Subspace

RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000)
SIZES = (128, 4096)
DIRECTIONS = 64
MODULE = "model.layers.0.self_attn.q_proj"


def subspace(size: int) -> Subspace:
    """Return a subspace of 64 random directions for a square matrix."""
    u, v = (torch.linalg.qr(gaussian(size, DIRECTIONS, seed=seed))[0].half() for seed in (0, 1))
    s = torch.arange(1, DIRECTIONS + 1).float().rsqrt()
    certificate = Certificate.from_core(_core.Certificate())
    module = ModuleSubspace(u, s, v, certificate, "0" * 64, "1" * 64)
    return Subspace({MODULE: module}, Provenance("", "base", "aligned", {}, {}))


def write(directory: Path, size: int, rank: int) -> Path:
    """Write an adapter."""
    directory.mkdir()
    prefix = f"base_model.model.{MODULE}"
    factors = {"lora_A.weight": gaussian(rank, size, seed=2), "lora_B.weight": gaussian(size, rank, seed=3)}
    tensors = {f"{prefix}.{name}": (0.01 * factor).half() for name, factor in factors.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def measure(adapter: Path, size: int) -> dict[str, Any]:
    """Return seconds, peak memory beyond what was taken before, and the outcome, for this process."""
    known = subspace(size)
    csulora.correct(
        csulora.load_adapter(write(adapter.with_name("small"), size, 1)), known, csulora.Policy.csulora()
    )  # starts threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    outcome = "corrected"
    try:
        fixed, _ = csulora.correct(csulora.load_adapter(adapter), known, csulora.Policy.csulora())
        csulora.save_adapter(fixed, adapter.with_name("corrected"))
    except csulora.RefusedError:
        outcome = "refused"
    seconds = time.perf_counter() - start
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"seconds": seconds, "bytes": memory, "outcome": outcome}


def measure_apart(size: int, rank: int, repetitions: int) -> dict[str, Any]:
    """Measure in processes of their own; medians."""
    runs = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as work:
            adapter = write(Path(work, "adapter"), size, rank)
            file = (adapter / "adapter_model.safetensors").stat().st_size
            command = [sys.executable, __file__, "--measure", str(adapter), "--size", str(size)]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {
        "size": size,
        "rank": rank,
        "file_bytes": file,
        "outcome": runs[0]["outcome"],
        "seconds": median(run["seconds"] for run in runs),
        "peak_bytes": median(run["bytes"] for run in runs),
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw time and memory beside the file's size, all as multiples of those at the smallest rank."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "csulora"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for size, marker in zip(SIZES, "os", strict=True):
        chosen = [row for row in rows if row["size"] == size]
        for axis, key, label in zip(axes, ("seconds", "peak_bytes"), ("seconds", "bytes"), strict=True):
            axis.plot(
                [row["rank"] for row in chosen], [row[key] for row in chosen], marker + "-", label=f"{size} x {size}"
            )
            axis.set(xscale="log", yscale="log", xlabel="rank of the factors", ylabel=label)
            for row in chosen:
                if row["outcome"] == "refused":
                    axis.annotate("refused", (row["rank"], row[key]), fontsize=7, rotation=30)
        axes[1].plot(
            [row["rank"] for row in chosen], [row["file_bytes"] for row in chosen], marker + ":", label="its file"
        )
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure every rank and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.size)))
        return
    rows = []
    for size in SIZES:
        for rank in RANKS:
            rows.append(measure_apart(size, rank, arguments.repetitions))
            row = rows[-1]
            print(
                f"{size} x {size}, rank {rank}: {row['outcome']} in {row['seconds']:.3f} s, "
                f"{row['peak_bytes'] / 2**20:.0f} MiB, file {row['file_bytes'] / 2**20:.2f} MiB"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
