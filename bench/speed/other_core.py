"""Another build of the core, which corrects the same files in a process of its own: one process cannot load two.

Run with the core and the files, it corrects once for each line of standard input, and answers with a line.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch  # noqa: F401  (the core needs its libraries)
from safetensors import safe_open


class OtherCore:
    """Corrects whenever it is called."""

    def __init__(self, core: Path, files: Sequence[Path]) -> None:
        """Start the process with a subspace file and an adapter, and wait until it has read them."""
        command = [sys.executable, __file__, str(core), *map(str, files)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self()

    def __call__(self) -> None:
        """Correct once."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise SystemExit("the other core has ended; see its message above")


def serve(path: Path, subspace: Path, adapter: Path) -> None:
    """Correct by the paper's penalties, once for each line."""
    specification = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert specification
    assert specification.loader
    core = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(core)
    directions, factors = (safe_open(file, framework="pt") for file in (subspace, adapter))
    penalties = core.Penalties(0.0, 1.0, 1.0)
    tasks = [
        core.CorrectionTask(
            core.LoraFactors(*(factors.get_tensor(f"{name}.{factor}") for factor in "ba")),
            core.Subspace(*(directions.get_tensor(f"{name}.{factor}") for factor in "usv")),
            penalties,
        )
        for name in (key.removesuffix(".a") for key in factors.keys() if key.endswith(".a"))  # noqa: SIM118
    ]
    for _ in sys.stdin:
        core.correct(tasks)
        print(flush=True)


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
