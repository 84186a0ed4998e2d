"""Train the small models, apply every policy and control to them, and write what came of it.

    python bench/efficacy/grid.py [--out DIR] [--only first carry ...] [--threads N]

Every cell is kept when it is finished, and models too: run the same command again to continue. When all cells of a
kind are there, `bench/results/efficacy/KIND.json` is written, and `report.py` makes tables and plots of them.
`experiments.py` is the table of what is run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import evaluate
import torch
import transformers
from experiments import KINDS
from subject import Record

import csulora
from csulora.io.files import to_json, write_text

OUT = Path("build/efficacy")
RESULTS = Path(__file__).parent.parent / "results" / "efficacy"


@cache
def provenance() -> Record:
    """What the figures come from; asked for first at the start, when this code is what is checked out."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "commit": commit,
        "csulora": csulora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def run(kind: str, out: Path) -> None:
    """Finish the cells of a kind, then write its results."""
    records = []
    for cell in KINDS[kind]:
        path = out / "cells" / f"{kind}-{cell.scenario.name}-{cell.adapter.name}.json"
        if not path.is_file():
            print(f"{path.stem} ...", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_json(cell.run(out)))
        records.append(json.loads(path.read_text()))
        # Written again after every cell: what there is can be looked at.
        write_text(RESULTS / f"{kind}.json", to_json({"made_with": provenance(), "cells": records}))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="models and finished cells (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cells (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    evaluate.quieten_libraries()
    provenance()
    for kind in arguments.only:
        run(kind, arguments.out)


if __name__ == "__main__":
    main()
