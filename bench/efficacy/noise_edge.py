"""How many directions survive storage in bfloat16, and are they right? On SmolLM2, where the float32 truth is known.

    python bench/efficacy/noise_edge.py [--models DIR] [--steps N] [--aligned DIR]

Tunes SmolLM2-135M-Instruct for some steps in float32, as `bench/real_model/prepare.py` does, or takes a model that was
tuned. Saves both models in bfloat16, extracts a subspace file from these copies, and compares it with the singular
vectors of the float32 displacement. Writes `bench/results/efficacy/noise_edge.json`, or another file, and prints a
summary.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import grid
import torch
from real_world import prepare
from safetensors import safe_open
from torch import Tensor

import csulora
from csulora.io.files import to_json, write_text

LAYERS = (0, 14, 29)  # of 30: every kind of matrix in each
RANK = 64
Record = dict[str, Any]


def make_copy(directory: Path, source: Path) -> None:
    """Save a model in bfloat16."""
    model, tokenizer = prepare.load(source)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def displacement(base: Any, aligned: Any, name: str) -> Tensor:
    """The displacement of a matrix, (out, in) float64; both models are open safetensors files."""
    moved: Tensor = aligned.get_tensor(name).double() - base.get_tensor(name).double()
    return moved


def overlap(truth: Tensor, found: Tensor) -> float:
    """Share of the found directions (size, k) that lies in the span of as many leading true ones (size, k or more)."""
    kept = found.shape[1]
    return float((truth[:, :kept].T @ found.double()).square().sum() / kept)


def compared(name: str, truth: Tensor, stored: Tensor, found: csulora.Subspace) -> Record:
    """What extraction kept of one matrix beside what the float32 models say."""
    u, _, vh = torch.linalg.svd(truth, full_matrices=False)
    rounding = float(torch.linalg.matrix_norm(stored - truth, 2))
    above = int((torch.linalg.svdvals(stored) > rounding).sum())
    module = found[name]
    return {
        "module": name,
        "kept": module.rank,
        "left_overlap": overlap(u, module.u),
        "right_overlap": overlap(vh.T, module.v),
        "above_rounding": min(above, RANK),
        "edge_over_rounding": module.certificate.noise_edge / rounding,
    }


def compare(models: dict[str, Path], found: csulora.Subspace) -> Iterator[Record]:
    """Compare every extracted matrix."""
    opened = {name: safe_open(path / "model.safetensors", "pt") for name, path in models.items()}
    for name in found:
        weight = f"{name}.weight"
        truth = displacement(opened["base"], opened["aligned"], weight)
        stored = displacement(opened["stored base"], opened["stored aligned"], weight)
        yield compared(name, truth, stored, found)


def summary(matrices: list[Record]) -> Record:
    """Median, smallest and largest of what matters."""
    keys = ("kept", "left_overlap", "right_overlap", "above_rounding", "edge_over_rounding")
    values = {key: [matrix[key] for matrix in matrices] for key in keys}
    return {key: {"median": median(each), "least": min(each), "most": max(each)} for key, each in values.items()}


def main() -> None:
    """Make what is missing, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=prepare.OUT, help="directory to work in (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=36, help="training steps (default: %(default)s)")
    parser.add_argument("--aligned", type=Path, help="a float32 model that was tuned from the base in --models")
    parser.add_argument("--results", type=Path, default=grid.RESULTS / "noise_edge.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(prepare.SEED)
    made_with = grid.provenance()
    out, steps = arguments.models.resolve(), arguments.steps
    tuned = arguments.aligned or out / f"aligned-{steps}"
    prepare.stage(out / "base", lambda directory: prepare.make_base(directory, out / "gguf"))
    prepare.stage(tuned, lambda directory: prepare.make_aligned(directory, out / "base", steps))
    stored = {"stored base": out / "stored-base", "stored aligned": out / f"stored-{tuned.name}"}
    for copy, source in zip(stored.values(), (out / "base", tuned), strict=True):
        prepare.stage(copy, lambda directory, source=source: make_copy(directory, source))  # type: ignore[misc]
    patterns = [f"model.layers.{layer}.*" for layer in LAYERS]
    begun = time.process_time()
    found = csulora.extract(*stored.values(), rank=RANK, modules=patterns)
    seconds = time.process_time() - begun
    matrices = list(compare({"base": out / "base", "aligned": tuned, **stored}, found))
    result = {"made_with": made_with, "steps": steps, "rank": RANK, "extraction_seconds": seconds}
    write_text(arguments.results, to_json(result | {"summary": summary(matrices), "matrices": matrices}))
    print(json.dumps(summary(matrices), indent=1))


if __name__ == "__main__":
    main()
