"""Adapters per second of `csulora guard`, beside reading and writing the same files, and its peak memory.

    python bench/speed/guard.py [--adapters 24] [--layers 4] [--jobs 1 2 4] [--json FILE]

The adapters are LoRA of rank 16 on all linear layers of some layers of Llama-3-8B, in float16; the subspace file has 64
directions for each module. One process per number of jobs opens it, and is timed from the first look at INCOMING to the
last result on disk. The floor reads the same files and writes as many bytes, flushed as the guard flushes them. Every
number of jobs is run on a third of the adapters too: memory must not grow with how many there are.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import safetensors.torch
import torch
from measuring import machine
from shapes import RANK, SHAPES, Shape, make_subspace

from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options


@dataclass(frozen=True)
class Run:
    """One pass of a guard, or of the floor.

    Attributes:
        jobs: uploads at a time; 0 for the floor.
        adapters: how many there were; ``seconds`` for all of them.
        peak_bytes: most resident memory of the process beyond that before the pass.
    """

    jobs: int
    adapters: int
    seconds: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Adapters per second."""
        return self.adapters / self.seconds


def make_adapter(directory: Path, shape: Shape, seed: int) -> None:
    """Write a PEFT adapter of random factors."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shape.modules().items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator).half()
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator).half()
    targets = sorted({name.rpartition(".")[2] for name in shape.modules()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def guarded(incoming: Path, outgoing: Path, subspace: Path, jobs: int) -> Run:
    """Time one pass of a guard in this process."""
    gate = Gate.open(subspace, "csulora", outgoing.with_suffix(".jsonl"), route="guard")
    worker = DirectoryGuard(incoming, outgoing, gate, Options(0.0, 0.0, jobs=jobs), say=lambda _: None)
    before, start = _peak(), time.perf_counter()
    worker.run(watch=False)
    elapsed = time.perf_counter() - start
    count = len(list(incoming.iterdir()))
    if worker.summary != f"{count} corrected":
        raise SystemExit(f"not all were corrected: {worker.summary}")
    return Run(jobs, count, elapsed, _peak() - before)


def floor(incoming: Path, outgoing: Path) -> Run:
    """Read every file and write its bytes, flushed to disk."""
    before, start = _peak(), time.perf_counter()
    paths = sorted(incoming.iterdir())
    for path in paths:
        (outgoing / path.name).mkdir(parents=True)
        for file in path.iterdir():
            with open(outgoing / path.name / file.name, "wb") as out:
                out.write(file.read_bytes())
                out.flush()
                os.fsync(out.fileno())
    return Run(0, len(paths), time.perf_counter() - start, _peak() - before)


def measure(work: Path, adapters: int, layers: int, jobs: list[int]) -> list[Run]:
    """Make the files, and run every pass in a process of its own."""
    whole = SHAPES["llama-3-8b"]
    shape = Shape(layers, whole.width, whole.hidden, whole.heads, whole.key_value_heads, whole.vocabulary)
    subspace = work / "subspace.safetensors"
    make_subspace(shape, subspace)
    few, many = work / "few", work / "many"
    for seed in range(adapters):
        make_adapter(many / f"adapter-{seed:03}", shape, seed)
    few.mkdir()
    for path in sorted(many.iterdir())[: adapters // 3]:
        shutil.copytree(path, few / path.name)
    runs = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for incoming in (few, many):
            runs.append(pool.apply(floor, (incoming, work / f"floor-{incoming.name}")))
            for count in jobs:
                outgoing = work / f"out-{incoming.name}-{count}"
                runs.append(pool.apply(guarded, (incoming, outgoing, subspace, count)))
                shutil.rmtree(outgoing)
    return runs


def main() -> None:
    """Measure and print a line per pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs = measure(Path(work), arguments.adapters, arguments.layers, arguments.jobs)
    for run in runs:
        what = f"{run.jobs} jobs" if run.jobs else "reading and writing"
        print(f"{what:20} {run.adapters:4} adapters {run.rate:6.1f} a second, {run.peak_bytes / 1e6:6.0f} MB")
    if arguments.json:
        document = {"machine": machine(), "layers": arguments.layers, "rank": RANK, "runs": [asdict(r) for r in runs]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
