"""Adapters per second of `csulora guard` and `csulora correct ADAPTER... -o DIR`, beside floors, and peak memory.

    python bench/speed/guard.py [--adapters 4 12] [--layers 32] [--cores 1 2] [--passes guard ...] [--json FILE]

The adapters are LoRA of rank 16 on all linear layers of some layers of Llama-3-8B, in bfloat16; the subspace file has
64 directions for each module. Every pass runs in a process of its own, on as many cores as the guard has jobs, and is
timed from the first look at the adapters to the last result on disk. Beside them stand

    copying     the same files read, and as many bytes written, flushed as the guard flushes them
    hashing     the same bytes hashed twice, once as they come and once as they go
    correcting  the same adapters corrected in memory, by the core alone

Whatever does all of it takes on one core at least the time of the three together, and on two at least half of that.
The incoming directory names three adapters again and again, as hard links: memory must not grow with how many there
are. ``--layers 0`` takes the adapters of a tiny model, for that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from measuring import machine
from shapes import RANK, SHAPES, Shape, make_adapter, make_subspace

import csulora
from csulora.cli.app import app
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options


@dataclass(frozen=True)
class Run:
    """One pass.

    Attributes:
        what: was done with each adapter.
        cores: on which it was done.
        adapters: how many there were; ``seconds`` for all of them.
        peak_bytes: most resident memory of the process beyond that before the pass.
    """

    what: str
    cores: int
    adapters: int
    seconds: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Adapters per second."""
        return self.adapters / self.seconds


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weights(incoming: Path) -> list[Path]:
    return sorted(incoming.glob("*/adapter_model.safetensors"))


def guarded(incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Callable[[], object]:
    """Return one pass of a guard."""
    gate = Gate.open(subspace, "csulora", outgoing.with_suffix(".jsonl"), route="guard")
    worker = DirectoryGuard(incoming, outgoing, gate, Options(0.0, 0.0, jobs=cores), say=lambda _: None)

    def run() -> None:
        worker.run(watch=False)
        if worker.summary != f"{len(_weights(incoming))} corrected":
            raise SystemExit(f"not all were corrected: {worker.summary}")

    return run


def command(incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Callable[[], object]:
    """Return one call of the command for several adapters, from options to results, without the start of Python."""
    adapters = [str(path) for path in sorted(incoming.iterdir())]
    options = ["--subspace", str(subspace), "--policy", "csulora", "-o", str(outgoing), "--quiet"]
    return partial(app, ["correct", *adapters, *options], standalone_mode=False)


def copying(incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Callable[[], object]:
    """Return reading every file, and writing its bytes, flushed to disk."""

    def run() -> None:
        for path in sorted(incoming.iterdir()):
            (outgoing / path.name).mkdir(parents=True)
            for file in path.iterdir():
                with open(outgoing / path.name / file.name, "wb") as out:
                    out.write(file.read_bytes())
                    out.flush()
                    os.fsync(out.fileno())

    return run


def hashing(incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Callable[[], object]:
    """Return hashing the bytes of every adapter twice."""
    contents = [file.read_bytes() for file in _weights(incoming)[:1]] * len(_weights(incoming))
    return lambda: [hashlib.sha256(content).digest() for content in contents for _ in range(2)]


def correcting(incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Callable[[], object]:
    """Return correcting every adapter in memory."""
    opened, policy = csulora.Subspace.open(subspace), csulora.Policy.csulora()
    loaded = [csulora.load_adapter(path) for path in sorted(incoming.iterdir())[:2]]
    csulora.correct(loaded[0], opened, policy)  # which validates the subspaces

    def run() -> None:
        for i in range(len(_weights(incoming))):
            csulora.correct(loaded[i % len(loaded)], opened, policy)

    return run


PASSES = {
    "copying": copying,
    "hashing": hashing,
    "correcting": correcting,
    "guard": guarded,
    "correct": command,
}


def timed(what: str, incoming: Path, outgoing: Path, subspace: Path, cores: int) -> Run:
    """Time one pass in this process, on its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    run = PASSES[what](incoming, outgoing, subspace, cores)
    before, start = _peak(), time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    found = Run(what, cores, len(_weights(incoming)), elapsed, _peak() - before)
    shutil.rmtree(outgoing, ignore_errors=True)
    return found


def links(adapters: Path, incoming: Path, count: int) -> Path:
    """Name ``count`` adapters in a directory, by turns the ones that there are, as hard links."""
    sources = sorted(adapters.iterdir())
    for i in range(count):
        shutil.copytree(sources[i % len(sources)], incoming / f"adapter-{i:05}", copy_function=os.link)
    return incoming


def measure(work: Path, layers: int, counts: list[int], cores: list[int], passes: list[str]) -> list[Run]:
    """Make the files, and run every pass in a process of its own, for each number of adapters."""
    whole = SHAPES["llama-3-8b"] if layers else SHAPES["tiny"]
    shape = Shape(
        layers or whole.layers, whole.width, whole.hidden, whole.heads, whole.key_value_heads, whole.vocabulary
    )
    make_subspace(shape, work / "subspace.safetensors")
    (work / "adapters").mkdir()
    for seed in range(3):
        make_adapter(shape, work / "adapters" / f"{seed}", torch.bfloat16)
    runs = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in counts:
            incoming = links(work / "adapters", work / f"in-{count}", count)
            for what in passes:
                for number in cores:
                    outgoing = work / f"out-{what}-{count}-{number}"
                    runs.append(pool.apply(timed, (what, incoming, outgoing, work / "subspace.safetensors", number)))
                    print(
                        f"{what:10} {number} cores {count:5} adapters {runs[-1].rate:7.2f} a second, "
                        f"{runs[-1].peak_bytes / 1e6:6.0f} MB",
                        flush=True,
                    )
    return runs


def main() -> None:
    """Measure and print a line per pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--layers", type=int, default=32, help="of Llama-3-8B; 0: a tiny model")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs = measure(Path(work), given.layers, given.adapters, given.cores, given.passes)
    if given.json:
        document = {"machine": machine(), "layers": given.layers, "rank": RANK, "runs": [asdict(run) for run in runs]}
        given.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
