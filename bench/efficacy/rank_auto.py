"""How many directions `rank="auto"` keeps of a model pair beside `rank=64`.

    python bench/efficacy/rank_auto.py [--out DIR] [--seeds 5 6 7] [--pair NAME BASE ALIGNED]

A pair of world (a) is one of its seeds, whose models are trained if they are not there; ``--pair`` adds any other.
Pairs that are counted are kept. `docs/tables.py` makes a table of the results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import grid
import torch
from lab import Lab
from scenario import Scenario
from subject import Record

import csulora
from csulora.extraction.extract import Rank
from csulora.io.files import to_json, write_text

RANKS: tuple[Rank, ...] = ("auto", 64)
RESULTS = grid.RESULTS / "rank_auto.json"


def counted(base: Path, aligned: Path) -> Record:
    """How many directions both ranks keep, the processor's seconds, and in how many modules they differ."""
    found: dict[str, list[int]] = {}
    seconds = {}
    for rank in RANKS:
        begun = time.process_time()
        subspace = csulora.extract(base, aligned, rank=rank, device="cpu")
        seconds[str(rank)] = round(time.process_time() - begun, 1)
        found[str(rank)] = [module.rank for module in subspace.values()]
    return {
        "directions": {rank: {"mean": fmean(each), "least": min(each)} for rank, each in found.items()},
        "cpu_seconds": seconds,
        "modules": len(found["auto"]),
        "differing": sum(one != other for one, other in zip(*found.values(), strict=True)),
    }


def main() -> None:
    """Parse the command line, and count what is not counted yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=grid.OUT, help="where models are (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[5, 6, 7])
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("NAME", "BASE", "ALIGNED"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grid.provenance()
    pairs: Record = json.loads(RESULTS.read_text())["pairs"] if RESULTS.exists() else {}
    labs = {f"world (a), seed {seed}": Lab(arguments.out, Scenario(seed)) for seed in arguments.seeds}
    wanted = {name: (lab.base(), lab.aligned()) for name, lab in labs.items()}
    wanted |= {name: (Path(base), Path(aligned)) for name, base, aligned in arguments.pair}
    for name, models in wanted.items():
        if name not in pairs:
            pairs[name] = counted(*models)
            print(name, pairs[name], flush=True)
            write_text(RESULTS, to_json({"made_with": grid.provenance(), "pairs": pairs}))


if __name__ == "__main__":
    main()
