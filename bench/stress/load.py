"""Many threads and processes correct different adapters with one subspace file, for as long as asked.

    python bench/stress/load.py [--minutes 10] [--loads 5000] [--json FILE]

Half of the time 16 threads share a process and wait as a server's do (csulora.serving.limiter), half of it 4
processes share the machine. Every result must be that of a serial run, bit for bit. Memory may grow by less than 2 %
after the first tenth of the time, and the subspace file is mapped once per process, its pages shared. Then one process
loads and corrects adapters one after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from inputs import make_adapter, make_subspace

import csulora
from csulora.adapters.peft import directory as peft
from csulora.serving.limiter import limited

WIDTH, LAYERS, RANK, DIRECTIONS, ADAPTERS = 512, 4, 16, 32, 16
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (WIDTH, WIDTH)
    for layer in range(LAYERS)
    for name in ("q_proj", "k_proj", "v_proj")
}
MOST_GROWTH = 0.02


def make_inputs(directory: Path) -> tuple[Path, list[Path]]:
    """Write a subspace file, extracted from two checkpoints, and adapters."""
    subspace = make_subspace(directory, SHAPES, DIRECTIONS)
    settings = {"lora_alpha": 2 * RANK}
    return subspace, [
        make_adapter(directory / f"adapter-{seed}", SHAPES, seed, RANK, settings) for seed in range(ADAPTERS)
    ]


@limited()
def corrected_sha256(adapter: Path, subspace: csulora.Subspace) -> str:
    """Load and correct an adapter when the limiter lets this thread; hash what comes out."""
    fixed, _ = csulora.correct(csulora.load_adapter(adapter), subspace, csulora.Policy.csulora())
    digest = hashlib.sha256()
    for name, tensor in sorted(peft.tensors_of(fixed).items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory() -> int:
    """Bytes that this process alone has in memory; pages shared with files or processes are not counted."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))


def mappings(file: Path) -> int:
    """How often this process maps a file."""
    return sum(line.endswith(str(file)) for line in Path("/proc/self/maps").read_text().splitlines())


@dataclass
class Outcome:
    """What one process saw."""

    corrections: int
    seconds: float
    wrong: int  # results unlike the serial ones
    memory_after_warm_up: int
    memory_at_the_end: int
    mappings_of_the_subspace_file: int

    @property
    def growth(self) -> float:
        """Relative growth of memory after warm-up."""
        return self.memory_at_the_end / self.memory_after_warm_up - 1


def hammer(
    subspace_file: Path, adapters: list[Path], expected: dict[Path, str], threads: int, seconds: float
) -> Outcome:
    """Correct adapters in turn with one opened subspace file, on some threads, until the time is up."""
    torch.set_num_threads(1)
    subspace = csulora.Subspace.open(subspace_file)
    start = time.monotonic()
    counts, wrong, samples = [0] * threads, [0] * threads, []

    def work(index: int) -> None:
        while time.monotonic() - start < seconds:
            adapter = adapters[(index + counts[index]) % len(adapters)]
            wrong[index] += corrected_sha256(adapter, subspace) != expected[adapter]
            counts[index] += 1

    def sample() -> None:
        while (elapsed := time.monotonic() - start) < seconds:
            samples.append((elapsed, memory()))
            time.sleep(seconds / 200)

    with ThreadPoolExecutor(threads + 1) as pool:
        pool.submit(sample)
        list(pool.map(work, range(threads)))
    elapsed = time.monotonic() - start
    # Peaks within equal spans: how much is in use at one moment depends on what the threads are doing.
    warm = max(used for when, used in samples if 0.1 * seconds <= when <= 0.4 * seconds)
    last = max(used for when, used in samples if when >= 0.7 * seconds)
    return Outcome(sum(counts), elapsed, sum(wrong), warm, last, mappings(subspace_file))


def load_repeatedly(subspace_file: Path, adapters: list[Path], loads: int) -> Outcome:
    """Load and correct adapters one after the other in this process."""
    torch.set_num_threads(1)
    subspace = csulora.Subspace.open(subspace_file)
    expected = {adapter: corrected_sha256(adapter, subspace) for adapter in adapters}
    start, wrong, samples = time.monotonic(), 0, []
    for i in range(loads):
        adapter = adapters[i % len(adapters)]
        wrong += corrected_sha256(adapter, subspace) != expected[adapter]
        samples.append(memory())
    warm, last = max(samples[loads // 10 : loads * 4 // 10]), max(samples[loads * 7 // 10 :])
    return Outcome(loads, time.monotonic() - start, wrong, warm, last, mappings(subspace_file))


def in_processes(count: int, function: Callable[..., Outcome], *arguments: object) -> list[Outcome]:
    """Run a function in fresh processes at the same time."""
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        return [job.get() for job in [pool.apply_async(function, arguments) for _ in range(count)]]


@dataclass
class Results:
    """Everything measured."""

    one_thread: list[Outcome] = field(default_factory=list)
    threads: list[Outcome] = field(default_factory=list)
    processes: list[Outcome] = field(default_factory=list)
    repeated: list[Outcome] = field(default_factory=list)

    def rate(self, outcomes: list[Outcome]) -> float:
        """Corrections per second of processes that ran at the same time."""
        return sum(outcome.corrections / outcome.seconds for outcome in outcomes)

    def summary(self) -> dict[str, object]:
        """The figures that count."""
        alone = self.rate(self.one_thread)
        everything = [*self.one_thread, *self.threads, *self.processes, *self.repeated]
        return {
            "corrections": sum(outcome.corrections for outcome in everything),
            "wrong": sum(outcome.wrong for outcome in everything),
            "throughput_of_16_threads": round(self.rate(self.threads) / alone, 3),
            "throughput_of_4_processes": round(self.rate(self.processes) / alone, 3),
            "largest_growth": round(max(o.growth for o in [*self.threads, *self.processes, *self.repeated]), 4),
            "mappings_of_the_subspace_file": max(outcome.mappings_of_the_subspace_file for outcome in everything),
        }


def measure(minutes: float, loads: int) -> Results:
    """Run all phases; the one thread that throughput is compared with gets a tenth of the time."""
    results, seconds = Results(), 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        subspace, adapters = make_inputs(Path(name))
        opened = csulora.Subspace.open(subspace)
        expected = {adapter: corrected_sha256(adapter, opened) for adapter in adapters}
        results.one_thread = in_processes(1, hammer, subspace, adapters, expected, 1, seconds / 10)
        results.threads = in_processes(1, hammer, subspace, adapters, expected, 16, seconds / 2)
        results.processes = in_processes(4, hammer, subspace, adapters, expected, 1, seconds / 2)
        if loads:
            results.repeated = in_processes(1, load_repeatedly, subspace, adapters, loads)
    return results


def main() -> None:
    """Measure, print the summary, and fail if a result was wrong or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--loads", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.minutes, arguments.loads)
    summary = results.summary()
    print(json.dumps(summary, indent=2))
    if arguments.json:
        machine = {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
            "csulora": csulora.__version__,
            "torch": torch.__version__,
        }
        document = {"machine": machine, "minutes": arguments.minutes, "summary": summary, "outcomes": asdict(results)}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if summary["wrong"] or not float(str(summary["largest_growth"])) < MOST_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
