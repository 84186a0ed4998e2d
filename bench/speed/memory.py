"""Peak memory of `csulora extract` on matrices of Llama-3-8B's shapes: it must not grow with the number of layers.

    python bench/speed/memory.py [--run few many full] [--rank 64] [--json FILE]

Writes random bfloat16 model pairs of 2 and of 4 layers to a temporary directory (4 GB of disk, removed after),
runs the command on each and prints the peak of its resident memory beyond that of an interpreter that has loaded torch
and the core, in multiples of the largest matrix in float32. All layers hold the same numbers.

The peak counts everything that is resident (VmHWM). Pages of mapped checkpoint files are page cache that the system may
take back at any time. They are also told apart (RssFile) from memory that it may not (RssAnon); the parts may peak at
different times, and their sum exceed the whole.

A last run takes a rank at which every matrix needs the full decomposition, which is what takes most memory.
Each run can be made alone, and replaces its own figures in the file. Exits with 1 if 4 layers take over a tenth more
than 2, or if a run takes more than 3 times the largest matrix, or 4 times for full decompositions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import LLAMA_3_8B, machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

LARGEST = 4 * max(rows * columns for rows, columns in LLAMA_3_8B.values())  # bytes in float32
LAYERS = {"few": 2, "many": 4}
FULL_RANK = 512  # eight times 512 and oversampling exceed 4096
MOST_GROWTH = 1.1
MOST_MULTIPLES = {"few": 3.0, "many": 3.0, "full": 4.0}
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Peak:
    """Peaks of resident memory in bytes; the three need not have been reached at one time."""

    total: int
    anonymous: int
    files: int

    def beyond(self, baseline: Peak) -> dict[str, float]:
        """Return the multiples of the largest matrix that were used beyond the baseline."""
        return {name: (value - getattr(baseline, name)) / LARGEST for name, value in asdict(self).items()}


def write_model_pair(directory: Path, layers: int) -> tuple[Path, Path]:
    """Write a base and an aligned checkpoint that differ by a falling low-rank change and a little noise."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base, aligned = directory / "base", directory / "aligned"
    weights: dict[Path, dict[str, torch.Tensor]] = {base: {}, aligned: {}}
    for module, (rows, columns) in LLAMA_3_8B.items():
        before = 0.02 * gaussian(rows, columns)
        falling = torch.arange(1, 65).rsqrt() * 1e-3
        change = (gaussian(rows, 64) * falling) @ gaussian(64, columns) + 1e-4 * gaussian(rows, columns)
        weights[base][module], weights[aligned][module] = before.bfloat16(), (before + change).bfloat16()
    for checkpoint, tensors in weights.items():
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
        files: dict[str, str] = {}
        for layer in range(layers):
            shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
            named = {f"model.layers.{layer}.{module}.weight": tensor for module, tensor in tensors.items()}
            save_file(named, checkpoint / shard, {"format": "pt"})
            files |= dict.fromkeys(named, shard)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return base, aligned


def measure(arguments: list[str]) -> tuple[Peak, float]:
    """Run the interpreter with these arguments; return its peaks of memory and the seconds it took."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except ProcessLookupError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        time.sleep(SAMPLE_SECONDS)
    if process.wait() != 0:
        raise SystemExit(f"python {' '.join(arguments)} failed with {process.returncode}")
    return Peak(peaks["VmHWM"], peaks["RssAnon"], peaks["RssFile"]), time.perf_counter() - start


def run(layers: int, rank: int, modules: tuple[str, ...], baseline: Peak) -> dict[str, Any]:
    """Extract a subspace file from a model pair of so many layers and return what was measured."""
    with tempfile.TemporaryDirectory(prefix="csulora-memory-") as temporary:
        base, aligned = write_model_pair(Path(temporary), layers)
        chosen = [argument for module in modules for argument in ("--modules", module)]
        subspace = str(Path(temporary) / "subspace.safetensors")
        command = ["-m", "csulora", "extract", str(base), str(aligned), "-o", subspace, "--rank", str(rank), "--quiet"]
        peak, seconds = measure([*command, *chosen])
    return {
        "layers": layers,
        "rank": rank,
        "modules": list(modules),
        "peak_bytes": asdict(peak),
        "multiples_beyond_baseline": peak.beyond(baseline),
        "seconds": round(seconds, 1),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Print the multiples."""
    table = Table("layers", "rank", "peak", "anonymous", "files", "seconds", title="multiples of 14336 x 4096 float32")
    for result in runs:
        multiples = result["multiples_beyond_baseline"]
        shown = [f"{multiples[name]:.2f}" for name in ("total", "anonymous", "files")]
        table.add_row(str(result["layers"]), str(result["rank"]), *shown, str(result["seconds"]))
    Console().print(table)


def main() -> int:
    """Measure, print, write, and say whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=[*LAYERS, "full"], default=[*LAYERS, "full"])
    parser.add_argument("--rank", type=int, default=64, help="directions per module (default: 64)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()

    baseline, _ = measure(["-c", "import csulora; csulora.extract"])  # looking it up loads torch and the core
    runs = {name: run(layers, arguments.rank, (), baseline) for name, layers in LAYERS.items() if name in arguments.run}
    if "full" in arguments.run:
        runs["full"] = run(1, FULL_RANK, ("*.mlp.up_proj", "*.mlp.down_proj"), baseline)
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())["runs"]
        runs = dict(zip((*LAYERS, "full"), before, strict=True)) | runs
    show(list(runs.values()))
    if arguments.json:
        result = {
            "machine": machine(),
            "largest_matrix_bytes": LARGEST,
            "baseline_bytes": asdict(baseline),
            "runs": list(runs.values()),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    multiples = {name: result["multiples_beyond_baseline"]["total"] for name, result in runs.items()}
    grows = {"few", "many"} <= multiples.keys() and multiples["many"] > MOST_GROWTH * multiples["few"]
    return int(grows or any(multiple > MOST_MULTIPLES[name] for name, multiple in multiples.items()))


if __name__ == "__main__":
    sys.exit(main())
