"""Correction of a Llama-3-8B-shaped adapter on a GPU, adapter and subspace file resident, against eager PyTorch on it.

    python bench/speed/gpu/correct.py [--rank 16] [--directions 64] [--repeats 20] [--eager-layers 8] [--json FILE]

Both get the same tensors: factors in bfloat16, subspaces in float16. The eager code is the same algorithm, module by
module, in float64 with Householder QR and an SVD, for the first layers alone: its time is theirs times as many as there
are. Results for the same factors of these layers held in float32, which they are then rounded to, must agree before
anything is timed. Runs alternate; medians.
The floor is the larger of the time of the bytes that must be read and written once, and of the operations of one split,
one Gram matrix and one product per side, at the bandwidth and the float64 GEMM rate measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from common import LAYER, bandwidth, gemm_rate, machine, seconds, shapes, write
from torch import Tensor

from csulora.native import _core

PENALTIES = (0.0, 1.0, 1.0)
TOLERANCE = 1e-5  # of |dW|: float32 factors


Problem = tuple[_core.LoraFactors, _core.Subspace, str]


def make_problems(layers: int, rank: int, directions: int) -> list[Problem]:
    """Return random updates with half their energy inside random subspaces."""
    problems = []
    for i, (rows, columns) in enumerate(shapes(layers)):
        u, v = (torch.linalg.qr(torch.randn(size, directions, device="cuda"))[0] for size in (rows, columns))
        b = torch.randn(rows, rank, device="cuda") / rows**0.5
        b += u @ torch.randn(directions, rank, device="cuda") / directions**0.5
        a = torch.randn(rank, columns, device="cuda") / columns**0.5
        a += torch.randn(rank, directions, device="cuda") @ v.t() / directions**0.5
        s = torch.arange(1, directions + 1, device="cuda").float().rsqrt()
        subspace = _core.Subspace(u.half().contiguous(), s, v.half().contiguous())
        factors = _core.LoraFactors(b.bfloat16(), a.bfloat16().contiguous(), 2.0)
        problems.append((factors, subspace, f"module {i}"))
    return problems


def widened(problem: Problem) -> Problem:
    """Return the same problem with its factors in float32."""
    factors, subspace, label = problem
    return _core.LoraFactors(factors.b.float(), factors.a.float(), factors.scale), subspace, label


def core_tasks(problems: list[Problem]) -> list[_core.CorrectionTask]:
    """Return what the core takes."""
    penalties = _core.Penalties(*PENALTIES)
    return [_core.CorrectionTask(factors, subspace, penalties, label) for factors, subspace, label in problems]


def split(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return orthonormal columns and the roots of what lies inside and outside the basis."""
    basis = basis.double()
    inside = basis @ (basis.t() @ factor)
    orthonormal, roots = torch.linalg.qr(torch.cat([inside, factor - inside], 1))
    rank = factor.shape[1]
    return orthonormal, roots[:, :rank], roots[:, rank:]


def eager(factors: _core.LoraFactors, subspace: _core.Subspace) -> tuple[Tensor, Tensor]:
    """Correct one update, rank kept."""
    rank = factors.b.shape[1]
    left, b_in, b_out = split(factors.b.double() * factors.scale, subspace.u)
    right, a_in, a_out = split(factors.a.double().t(), subspace.v)
    components = [b_in @ a_in.t(), b_in @ a_out.t(), b_out @ a_in.t(), b_out @ a_out.t()]
    norms2 = torch.stack([component.square().sum() for component in components])
    energies = norms2 / norms2.sum()
    aligned, partial, off = PENALTIES
    shared = 1 / (1 + partial * (energies[1] + energies[2]))
    gains = (1 / (1 + aligned * energies[0]), shared, shared, 1 / (1 + off * energies[3]))
    core = sum(gain * component for gain, component in zip(gains, components, strict=True))
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = left @ (u[:, :rank] * root), (right @ (vt[:rank].t() * root)).t()
    return b.to(factors.b.dtype), a.contiguous().to(factors.a.dtype)


def difference(factors: _core.LoraFactors, b: Tensor, a: Tensor) -> float:
    """|X - b a| / |b a| for factors of X, from the factors alone."""
    left = torch.linalg.qr(torch.cat([factors.b, b], 1).double())[1]
    right = torch.linalg.qr(torch.cat([factors.a, a]).double().t())[1]
    rank = b.shape[1]
    ours, theirs = left[:, :rank] @ right[:, :rank].t(), left[:, rank:] @ right[:, rank:].t()
    return float((ours - theirs).norm() / theirs.norm())


def floor(layers: int, rank: int, directions: int) -> tuple[float, float]:
    """Return the bytes and the operations that the correction cannot do without."""
    ends = sum(rows + columns for rows, columns in shapes(layers))
    return ends * (2 * directions + 2 * rank + 2 * rank), ends * (4 * directions * rank + 8 * rank**2 + 4 * rank**2)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--eager-layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    eager_layers = min(options.eager_layers, options.layers)
    torch.manual_seed(0)
    problems = make_problems(options.layers, options.rank, options.directions)
    tasks = core_tasks(problems)
    worst = 0.0
    compared = problems[: eager_layers * len(LAYER)]
    precise = [widened(problem) for problem in compared]
    for result, (factors, subspace, _) in zip(_core.correct(core_tasks(precise)), precise, strict=True):
        worst = max(worst, difference(result.factors, *eager(factors, subspace)))
    if not worst <= TOLERANCE:
        raise SystemExit(f"csulora and the eager code differ by {worst:.1e} of the update")

    ours: list[float] = []
    theirs: list[float] = []
    peak = 0
    for i in range(options.repeats + 2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds(lambda: _core.correct(tasks))
        peak = torch.cuda.max_memory_allocated() - before
        if i >= 2:  # those before warm up
            ours.append(took)
        if i % 4 == 2:  # an eager run takes far longer
            took = seconds(lambda: [eager(factors, subspace) for factors, subspace, _ in compared])
            theirs.append(took * options.layers / eager_layers)
    needed_bytes, operations = floor(options.layers, options.rank, options.directions)
    copy, rate = bandwidth(), gemm_rate(torch.float64)
    bound = max(needed_bytes / copy, operations / rate)
    median = statistics.median(ours)
    write(
        {
            **machine(),
            "modules": len(tasks),
            "rank": options.rank,
            "directions": options.directions,
            "eager_layers": eager_layers,
            "seconds": {"csulora": sorted(ours), "eager": sorted(theirs)},
            "median_seconds": {"csulora": median, "eager": statistics.median(theirs)},
            "times_eager": statistics.median(theirs) / median,
            "largest_difference": worst,
            "peak_bytes": peak,
            "bandwidth_bytes_per_second": copy,
            "float64_gemm_operations_per_second": rate,
            "floor_seconds": bound,
            "times_floor": median / bound,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
