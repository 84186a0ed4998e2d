"""Extraction and correction while other processes compute on all cores, beside their quiet time.

    python bench/speed/busy.py [--repetitions 5]

The foreign processes multiply matrices in one thread each, as many as there are cores. Extraction is the matrix of
`bulk.py` with a bulk, correction the adapter of rank 16 of `correction.py` with 64 directions. Writes
bench/results/speed/busy.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bulk
import torch
from correction_peers import mapped
from measuring import interleaved, save

import correction
from csulora.native import _core

FOREIGN = "import torch; torch.set_num_threads(1); a = torch.randn(1024, 1024)\nwhile True: a @ a"


@contextmanager
def foreign_processes(count: int) -> Iterator[None]:
    """Let processes compute that know nothing of this one."""
    processes = [subprocess.Popen([sys.executable, "-c", FOREIGN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Measure in quiet, then with foreign processes, and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    rows, columns, rank, _, spectrum = bulk.CASES["matrix"]
    torch.manual_seed(0)
    pairs, workspace = [bulk.pair(rows, columns, rank, spectrum)], _core.Workspace()
    with tempfile.TemporaryDirectory() as scratch:
        files = correction.write(correction.LAYERS, *correction.CASES["r16-k64"], Path(scratch))
        tasks = [module.task() for module in mapped(*files)]
        runs = {
            "extraction": lambda: bulk.csulora(pairs, rank, workspace),
            "correction": lambda: _core.correct(tasks),
            "svd_lowrank": lambda: bulk.svd_lowrank(pairs, rank + 16, rank, 10),
        }
        quiet = interleaved(runs, repetitions)
        cores = os.cpu_count() or 1
        with foreign_processes(cores):
            busy = interleaved(runs, repetitions)
    ratios = {name: busy[name]["median"] / quiet[name]["median"] for name in runs}
    print(ratios)
    save("busy", {"foreign_processes": cores, "quiet": quiet, "busy": busy, "ratios": ratios})


if __name__ == "__main__":
    main()
