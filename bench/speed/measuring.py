"""What the benchmarks share: interleaved medians, the rates of the machine, the record of a run."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed"
LLAMA_3_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def processor_seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call, of all threads together: hardly longer where others use the cores."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repetitions: int,
    measure: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, dict[str, Any]]:
    """Call all in turn, once unmeasured and then ``repetitions`` times; the median, least and number for each.

    Every turn has an order of its own: nobody always runs on what one and the same other leaves behind, such as memory
    to be cleared or threads that still spin.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for repetition in range(repetitions + 1):
        for name in order.sample(list(runs), len(runs)):
            elapsed = measure(runs[name])
            if repetition:
                times[name].append(elapsed)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, Any]:
    """Describe repeated times in seconds."""
    return {"median": statistics.median(values), "least": min(values), "repetitions": len(values)}


@dataclass(frozen=True)
class Usage:
    """What a process and its threads have used.

    Attributes:
        exit_code: of the process, negative for a signal.
        output: what it wrote to stdout, if that was kept.
        seconds: from its start to its end.
        processor_seconds: of all its threads together.
        peak_gb: the most memory that was resident.
    """

    exit_code: int
    output: str
    seconds: float
    processor_seconds: float
    peak_gb: float


def usage(
    command: Sequence[str | Path],
    environment: Mapping[str, str] = {},
    cwd: Path | None = None,
    *,
    keeps_output: bool = False,
) -> Usage:
    """Run a command to its end, with variables beside those of this process."""
    begun, stdout = time.perf_counter(), subprocess.PIPE if keeps_output else None
    with subprocess.Popen(command, env=os.environ | environment, cwd=cwd, stdout=stdout, text=True) as process:
        output = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, processor = time.perf_counter() - begun, used.ru_utime + used.ru_stime
    return Usage(process.returncode, output, seconds, processor, used.ru_maxrss * 1024 / 1e9)


def gemm(dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Return a large square product, `GEMM_FLOPS` operations."""
    left, right = torch.randn(2, 4096, 4096).to(dtype)
    return lambda: left @ right


GEMM_FLOPS = 2 * 4096**3


def copy() -> Callable[[], object]:
    """Return a copy in memory that reads and writes `COPY_BYTES` together."""
    source = torch.zeros(COPY_BYTES // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


COPY_BYTES = 1 << 30


def read_files(*files: Path) -> None:
    """Read files once, from the page cache if they lie there."""
    buffer = bytearray(16 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


_PACKAGES = ("csulora", "torch", "numpy", "scikit-learn")


def _is_installed(package: str) -> bool:
    return any(True for _ in distributions(name=package))


def machine() -> dict[str, Any]:
    """Say what measured, in which state."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES if _is_installed(package)},
        "commit": commit.stdout.strip(),
        "load_average": os.getloadavg(),
    }


def save(name: str, results: dict[str, Any]) -> None:
    """Write ``bench/results/speed/NAME.json`` with where it was measured."""
    document = {"machine": machine()} | results
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
