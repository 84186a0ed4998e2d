"""Correction of an adapter of Llama-3-8B's shape beside the dense formula, eager PyTorch and the reading of the files.

    python bench/speed/correction.py [--part peers] [--case r16-k64] [--peer CORE] [--repetitions 5]

Three adapters of 224 modules (rank 16 with 64 directions, 64 with 64, 16 with 256), and for the first how time grows
with directions and with layers. Each part can run alone, and replaces its own figures. `--peer` times another build
of the core, in a process of its own. The dense formula is Safe LoRA's (C = D D^T / |D|_F, C B A, cosine), timed once
on one module of each shape and scaled to all of them. Eager PyTorch runs the same factor algorithm, and
*lean* PyTorch one with less work: Gram matrices in float32, small problems in float64, no QR.
Before anything is timed, 8 layers of csulora and lean PyTorch must agree with eager PyTorch in float64.

The floor is the larger of the time of the bytes that must be read and written once, at the rate of a copy in memory,
and of the operations that the factor algorithm cannot do without, at the rate of large square products of their type,
all measured in the same run. Writes bench/results/speed/correction.json, with a suffix for another kind of CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from correction_peers import Module, eager, lean, mapped
from measuring import COPY_BYTES, GEMM_FLOPS, LLAMA_3_8B, RESULTS, copy, gemm, interleaved, read_files, save, seconds
from other_core import OtherCore
from safetensors.torch import save_file
from torch import Tensor

from csulora.native import _core

LAYERS = 32
CASES = {"r16-k64": (16, 64), "r64-k64": (64, 64), "r16-k256": (16, 256)}  # rank, directions of the subspace file
DIRECTIONS = (16, 32, 64, 128, 256, 512)
DEPTHS = (4, 8, 16, 24, 32)
PARTS = ("peers", "policies", "dense", "growth")
DEPTH_FOR_DIRECTIONS = 8
CHECKED = 8 * len(LLAMA_3_8B)  # modules
# What `csulora tune` writes for one adapter, and for several.
ALONG = _core.Directions([0.5] * 64, [0.5] * 64)
REINFORCING = _core.Directions([0.5] * 16, [0.5] * 16, [0.5] * 16)
FOLLOWING = _core.CorrectionOptions(reference_energy=0.1)
FILTER_RANK = 32  # directions
AGREEMENT = 1e-3  # relative to |X|; factors are float16, results float32


def write(layers: int, rank: int, directions: int, directory: Path) -> list[Path]:
    """Write a subspace file and an adapter."""
    generator = torch.Generator().manual_seed(0)
    sizes = sorted({size for shape in LLAMA_3_8B.values() for size in shape})
    bases = {
        size: torch.linalg.qr(torch.randn(size, directions, generator=generator))[0].half().contiguous()
        for size in sizes
    }
    subspace: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (rows, columns) in LLAMA_3_8B.items():
            key = f"{layer}.{name}"
            subspace |= {f"{key}.u": bases[rows].clone(), f"{key}.v": bases[columns].clone()}
            subspace[f"{key}.s"] = torch.arange(1, directions + 1).float().rsqrt()
            adapter[f"{key}.b"] = (torch.randn(rows, rank, generator=generator) / rows**0.5).half()
            adapter[f"{key}.a"] = (torch.randn(rank, columns, generator=generator) / columns**0.5).half()
    files = [directory / f"{what}_{layers}_{rank}_{directions}" for what in ("subspace", "adapter")]
    save_file(subspace, files[0])
    save_file(adapter, files[1])
    return files


def check_agreement(modules: Sequence[Module]) -> float:
    """Return the largest relative difference to eager PyTorch in float64; fail if it is too large."""
    worst = 0.0
    for module, found in zip(modules, _core.correct([module.task() for module in modules]), strict=True):
        b, a, undo = eager(module, torch.float64)
        probe = torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(1)).double()
        expected = b @ (a @ probe)
        lean_b, lean_a, _ = lean(module)
        products = [
            first.double() @ (second.double() @ probe)
            for first, second in ((found.factors.b, found.factors.a), (lean_b, lean_a))
        ]
        difference = max(float((product - expected).norm() / expected.norm()) for product in products)
        worst = max(worst, difference)
        if difference > AGREEMENT or not math.isclose(undo, found.undo, rel_tol=AGREEMENT, abs_tol=AGREEMENT):
            raise SystemExit(f"results differ by {difference:.1e}")
    return worst


def dense_seconds() -> dict[str, float]:
    """Safe LoRA's formula for all 224 modules, from one of each shape; with and without the making of C."""
    totals = {"dense": 0.0, "dense, C given": 0.0}
    for shape, count in Counter(LLAMA_3_8B.values()).items():
        making, applying = _dense_module_seconds(*shape)
        totals["dense"] += LAYERS * count * (making + applying)
        totals["dense, C given"] += LAYERS * count * applying
    return totals


def _dense_module_seconds(rows: int, columns: int) -> tuple[float, float]:
    displacement, b, a = torch.randn(rows, columns), torch.randn(rows, 16), torch.randn(16, columns)
    projectors: list[Tensor] = []

    def make_projector() -> None:
        projectors.append(displacement @ displacement.t() / displacement.norm())

    def apply() -> None:
        projected, update = (projectors[0] @ b) @ a, b @ a
        torch.nn.functional.cosine_similarity(projected.reshape(1, -1), update.reshape(1, -1))

    return seconds(make_projector), seconds(apply)


def floor(rank: int, directions: int, times: Mapping[str, Mapping[str, Any]]) -> float:
    """The seconds of whatever takes longer: moving the bytes, or computing.

    Of every row of either factor: its coordinates and what they span, one product with what the rank rule keeps, in
    float32, and in float64 half of a symmetric Gram matrix of both halves.
    """
    ends = LAYERS * sum(rows + columns for rows, columns in LLAMA_3_8B.values())
    moved = ends * (2 * directions + 2 * rank + 2 * rank)
    single, double = ends * (4 * directions * rank + 4 * rank**2), ends * 4 * rank**2
    computing = single * times["gemm"]["median"] + double * times["float64 gemm"]["median"]
    return float(max(moved / COPY_BYTES * times["copy"]["median"], computing / GEMM_FLOPS))


def peers(modules: Sequence[Module], files: Sequence[Path], peer: Path | None) -> dict[str, Callable[[], object]]:
    """Return what is timed side by side."""
    penalised = [module.task() for module in modules]
    runs: dict[str, Callable[[], object]] = {
        "gemm": gemm(),
        "float64 gemm": gemm(torch.float64),
        "copy": copy(),
        "read": lambda: read_files(*files),
        "csulora": lambda: _core.correct(penalised),
        "lean float32": lambda: [lean(module) for module in modules],
        "eager float32": lambda: [eager(module, torch.float32) for module in modules],
        "eager float64": lambda: [eager(module, torch.float64) for module in modules],
    }
    if peer:
        runs["other core"] = OtherCore(peer, files)
    return runs


def policies(modules: Sequence[Module]) -> dict[str, Callable[[], object]]:
    """Return corrections by what `csulora tune` writes."""
    along, reinforcing = ([module.task(attenuation) for module in modules] for attenuation in (ALONG, REINFORCING))
    sizes = {columns for _, columns in LLAMA_3_8B.values()}
    input_filters = {
        size: _core.InputFilter(*(torch.randn(size, FILTER_RANK) / size**0.5 for _ in "pq")) for size in sizes
    }
    filtered = [module.task(REINFORCING, input_filters) for module in modules]
    return {
        "csulora, 64 directions": lambda: _core.correct(along),
        "csulora, 16 directions and reinforcing": lambda: _core.correct(reinforcing, FOLLOWING),
        "csulora, the same with input filters": lambda: _core.correct(filtered, FOLLOWING),
    }


def measure(name: str, parts: Sequence[str], peer: Path | None, repetitions: int, directory: Path) -> dict[str, Any]:
    """Time one adapter and subspace file."""
    rank, directions = CASES[name]
    files = write(LAYERS, rank, directions, directory)
    modules = mapped(*files)
    found: dict[str, Any] = {"rank": rank, "directions": directions, "seconds": {}}
    if "peers" in parts:
        found["largest_difference"] = check_agreement(modules[:CHECKED])
        found["seconds"] |= interleaved(peers(modules, files, peer), repetitions)
        found["floor_seconds"] = floor(rank, directions, found["seconds"])
    if "policies" in parts:
        found["seconds"] |= interleaved(policies(modules), repetitions)
    for file in files:
        file.unlink()
    return found


def growth(points: Sequence[tuple[int, int]], repetitions: int, directory: Path) -> list[dict[str, Any]]:
    """Time rank 16 at pairs of layers and directions."""
    results = []
    for layers, directions in points:
        files = write(layers, 16, directions, directory)
        tasks = [module.task() for module in mapped(*files)]
        times = interleaved({"csulora": partial(_core.correct, tasks)}, repetitions)
        results.append({"layers": layers, "directions": directions, "seconds": times["csulora"]})
        for file in files:
            file.unlink()
    return results


def replaced(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return what a file of results holds, with new figures in the place of old ones."""
    before = json.loads(file.read_text()) if file.exists() else {}
    cases = {(case["rank"], case["directions"]): case for case in before.get("cases", [])}
    for case in results.pop("cases"):
        old = cases.setdefault((case["rank"], case["directions"]), {"seconds": {}})
        old |= case | {"seconds": old["seconds"] | case["seconds"]}
    before.pop("machine", None)
    return before | results | {"cases": list(cases.values())}


def main() -> None:
    """Measure what is asked for and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer", type=Path, help="another build of the core, a file")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    results: dict[str, Any] = {"modules": LAYERS * len(LLAMA_3_8B), "cases": []}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if set(arguments.part) & {"peers", "policies"}:
            results["cases"] = [
                measure(case, arguments.part, arguments.peer, repetitions, directory) for case in arguments.case
            ]
        if "dense" in arguments.part:
            results["dense_seconds"] = dense_seconds()
        if "growth" in arguments.part:
            results["by_directions"] = growth([(DEPTH_FOR_DIRECTIONS, k) for k in DIRECTIONS], repetitions, directory)
            results["by_layers"] = growth([(layers, 64) for layers in DEPTHS], repetitions, directory)
    name = f"correction{arguments.suffix}"
    save(name, replaced(RESULTS / f"{name}.json", results))


if __name__ == "__main__":
    main()
