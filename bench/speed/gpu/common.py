"""What both GPU benchmarks need: the shapes, the machine, its measured rates, and how results are written."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import csulora

WIDTH, HIDDEN, NARROW = 4096, 14336, 1024
# The linear layers of Llama-3-8B: (out, in).
LAYER = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (NARROW, WIDTH),
    "v_proj": (NARROW, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (HIDDEN, WIDTH),
    "up_proj": (HIDDEN, WIDTH),
    "down_proj": (WIDTH, HIDDEN),
}


def shapes(layers: int) -> list[tuple[int, int]]:
    """Return the shapes of all modules, layer by layer."""
    return [shape for _ in range(layers) for shape in LAYER.values()]


def seconds(call: Callable[[], object]) -> float:
    """Return the time of one call, what it leaves running on the GPU included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call after one that does not count."""
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def bandwidth() -> float:
    """Return the bytes per second of a copy on the GPU, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), 10)


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a large square product."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=result), 5)


def machine() -> dict[str, Any]:
    """Say what measured."""
    root = Path(__file__).resolve().parents[3]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "csulora": csulora.__version__,
        "commit": commit or None,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def write(document: dict[str, Any], path: Path | None) -> None:
    """Print a result, and write it to a file if one is given."""
    text = json.dumps(document, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
