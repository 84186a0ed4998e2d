"""Correction of an adapter of Llama-3-8B's shape beside the dense formula, eager PyTorch and the reading of the files.

    python bench/speed/correction.py [--repetitions 5] [--suffix S]

Three adapters of 224 modules (rank 16 with 64 directions, 64 with 64, 16 with 256), and for the first how time grows
with directions and with layers. The dense formula is Safe LoRA's (C = D D^T / |D|_F, C B A, cosine), timed once on one
module of each shape and scaled to all of them. Eager PyTorch runs the same factor algorithm module by module, and
*lean* PyTorch one with less work: Gram matrices in float32, small problems in float64, no QR.
Before anything is timed, all modules of csulora and lean PyTorch must agree with eager PyTorch in float64.

The floor is the larger of the time of the bytes that must be read and written once, at the rate of a copy in memory,
and of the operations that the factor algorithm cannot do without, at the rate of large square products of their type,
all measured in the same run. Writes bench/results/speed/correction.json, with a suffix for another kind of CPU.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import COPY_BYTES, GEMM_FLOPS, LLAMA_3_8B, copy, gemm, interleaved, read_files, save, seconds
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from csulora.native import _core

LAYERS = 32
CASES = ((16, 64), (64, 64), (16, 256))  # rank of the adapter, directions of the subspace file
DIRECTIONS = (16, 32, 64, 128, 256, 512)
DEPTHS = (4, 8, 16, 24, 32)
DEPTH_FOR_DIRECTIONS = 8
Attenuation = _core.Penalties | _core.Components | _core.Directions
PENALTIES = _core.Penalties(0.0, 1.0, 1.0)
# What `csulora tune` writes for one adapter, and for several.
ALONG = _core.Directions([0.5] * 64, [0.5] * 64)
REINFORCING = _core.Directions([0.5] * 16, [0.5] * 16, [0.5] * 16)
FOLLOWING = _core.CorrectionOptions(reference_energy=0.1)
FILTER_RANK = 32  # directions
AGREEMENT = 1e-3  # relative to |X|; factors are float16, results float32


@dataclass(frozen=True)
class Module:
    """An update b a and the factors of its module."""

    b: Tensor
    a: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    def task(
        self, attenuation: Attenuation = PENALTIES, input_filters: Mapping[int, _core.InputFilter] | None = None
    ) -> _core.CorrectionTask:
        """Return what the core takes; the input filters are by number of inputs."""
        subspace = _core.Subspace(self.u, self.s, self.v)
        input_filter = input_filters[self.a.shape[1]] if input_filters else None
        return _core.CorrectionTask(_core.LoraFactors(self.b, self.a), subspace, attenuation, input_filter=input_filter)


def make(layers: int, rank: int, directions: int, directory: Path) -> tuple[list[Module], list[Path]]:
    """Write a subspace file and an adapter, and map them again."""
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
    files = [directory / f"pack_{layers}_{rank}_{directions}", directory / f"adapter_{layers}_{rank}_{directions}"]
    save_file(subspace, files[0])
    save_file(adapter, files[1])
    del subspace, adapter
    mapped = [safe_open(file, framework="pt") for file in files]
    return [
        Module(
            *(mapped[1].get_tensor(f"{layer}.{name}.{factor}") for factor in "ba"),
            *(mapped[0].get_tensor(f"{layer}.{name}.{factor}") for factor in "usv"),
        )
        for layer in range(layers)
        for name in LLAMA_3_8B
    ], files


def eager(module: Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The factor algorithm with rank rule keep: (b, a) of X, and undo."""
    b, a, u, v = (tensor.to(dtype) for tensor in (module.b, module.a, module.u, module.v))
    s = module.s.to(dtype)
    rank = b.shape[1]
    left, right = u.t() @ b, a @ v  # (k, r), (r, k)
    inside_b, inside_a = u @ left, right @ v.t()
    outside_b, outside_a = b - inside_b, a - inside_a
    gram_b = inside_b.t() @ inside_b, outside_b.t() @ outside_b
    gram_a = inside_a @ inside_a.t(), outside_a @ outside_a.t()
    energies = torch.stack([(gram_b[i] * gram_a[j]).sum() for i in (0, 1) for j in (0, 1)])
    aligned, upper, lower, off = energies / energies.sum()
    shares = torch.stack([aligned, upper + lower, upper + lower, off])
    penalties = torch.tensor([PENALTIES.aligned, PENALTIES.partial, PENALTIES.partial, PENALTIES.off], dtype=dtype)
    gains = (1 / (1 + penalties * shares)).reshape(2, 2)
    undo = -((left * s[:, None]) * right.t()).sum() / s.square().sum()
    q_b, r_b = torch.linalg.qr(torch.cat([inside_b, outside_b], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([inside_a, outside_a]).t())
    core = r_b @ torch.kron(gains, torch.eye(rank, dtype=dtype)) @ r_a.t()
    w, values, zt = torch.linalg.svd(core)
    return q_b @ (w[:, :rank] * values[:rank]), zt[:rank] @ q_a.t(), float(undo)


def lean(module: Module) -> tuple[Tensor, Tensor, float]:
    """The same in float32 with float64 for the small problems alone: Gram matrices, no QR and nothing beside X.

    Traces of float32 Gram matrices are less exact where little of an update lies on one side: off by 2^-24 of all of
    it.
    """
    b, a, u, v = (tensor.float() for tensor in (module.b, module.a, module.u, module.v))
    rank = b.shape[1]
    left, right = u.t() @ b, v.t() @ a.t()  # (k, r)
    inside_b, inside_a = u @ left, v @ right
    halves_b, halves_a = torch.cat([inside_b, b - inside_b], 1), torch.cat([inside_a, a.t() - inside_a], 1)
    gram_b, gram_a = (halves_b.t() @ halves_b).double(), (halves_a.t() @ halves_a).double()
    sides = (slice(rank), slice(rank, None))
    energies = torch.stack([(gram_b[i, i] * gram_a[j, j]).sum() for i in sides for j in sides])
    aligned, upper, lower, off = energies / energies.sum()
    shares = torch.stack([aligned, upper + lower, upper + lower, off])
    penalties = torch.tensor([PENALTIES.aligned, PENALTIES.partial, PENALTIES.partial, PENALTIES.off]).double()
    mixing = torch.kron((1 / (1 + penalties * shares)).reshape(2, 2), torch.eye(rank, dtype=torch.float64))
    s = module.s.double()
    undo = -((left * right).sum(1).double() * s).sum() / s.square().sum()
    mixed = torch.linalg.cholesky(gram_b).t() @ mixing
    squares, vectors = torch.linalg.eigh(mixed @ gram_a @ mixed.t())
    values = squares[-rank:].clamp_min(0).sqrt()
    mixture_a = mixed.t() @ (vectors[:, -rank:] / values.sqrt())
    mixture_b = mixing @ (gram_a @ mixture_a) / values
    return (halves_b @ mixture_b.float()).to(module.b.dtype), (mixture_a.float().t() @ halves_a.t()).half(), float(undo)


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


def measure(case: tuple[int, int], repetitions: int, directory: Path) -> dict[str, Any]:
    """Time one adapter and subspace file."""
    rank, directions = case
    modules, files = make(LAYERS, rank, directions, directory)
    worst = check_agreement(modules)
    penalised, along, reinforcing = (
        [module.task(attenuation) for module in modules] for attenuation in (PENALTIES, ALONG, REINFORCING)
    )
    sizes = {columns for _, columns in LLAMA_3_8B.values()}
    input_filters = {
        size: _core.InputFilter(*(torch.randn(size, FILTER_RANK) / size**0.5 for _ in "pq")) for size in sizes
    }
    filtered = [module.task(REINFORCING, input_filters) for module in modules]
    times = interleaved(
        {
            "gemm": gemm(),
            "float64 gemm": gemm(torch.float64),
            "copy": copy(),
            "read": lambda: read_files(*files),
            "csulora": lambda: _core.correct(penalised),
            "csulora, 64 directions": lambda: _core.correct(along),
            "csulora, 16 directions and reinforcing": lambda: _core.correct(reinforcing, FOLLOWING),
            "csulora, the same with input filters": lambda: _core.correct(filtered, FOLLOWING),
            "lean float32": lambda: [lean(module) for module in modules],
            "eager float32": lambda: [eager(module, torch.float32) for module in modules],
            "eager float64": lambda: [eager(module, torch.float64) for module in modules],
        },
        repetitions,
    )
    for file in files:
        file.unlink()
    return {
        "rank": rank,
        "directions": directions,
        "largest_difference": worst,
        "seconds": times,
        "floor_seconds": floor(rank, directions, times),
    }


def growth(points: Sequence[tuple[int, int]], repetitions: int, directory: Path) -> list[dict[str, Any]]:
    """Time rank 16 at pairs of layers and directions."""
    results = []
    for layers, directions in points:
        modules, files = make(layers, 16, directions, directory)
        tasks = [module.task() for module in modules]
        times = interleaved({"csulora": partial(_core.correct, tasks)}, repetitions)
        results.append({"layers": layers, "directions": directions, "seconds": times["csulora"]})
        for file in files:
            file.unlink()
    return results


def main() -> None:
    """Measure everything and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        results = {
            "modules": LAYERS * len(LLAMA_3_8B),
            "cases": [measure(case, repetitions, directory) for case in CASES],
            "dense_seconds": dense_seconds(),
            "by_directions": growth([(DEPTH_FOR_DIRECTIONS, k) for k in DIRECTIONS], repetitions, directory),
            "by_layers": growth([(layers, 64) for layers in DEPTHS], repetitions, directory),
        }
    save(f"correction{arguments.suffix}", results)


if __name__ == "__main__":
    main()
