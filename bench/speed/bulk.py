"""Extraction where a bulk follows what stands out, beside torch.svd_lowrank.

    python bench/speed/bulk.py [--case matrix tall experts-bulk experts-falling] [--repetitions 5] [--processor-time]
        [--suffix S]

Pairs are in bfloat16. The bulk of ``matrix`` (4096 x 4096) and ``tall`` (14336 x 4096) lies above rounding, 16
directions stand out of it, and k is 64 or `auto`. `experts` are 16 matrices of 768 x 2048, k 16, in one call.
Everyone starts from both matrices in memory. The peer is run with several numbers of iterations; compare times where
it captures as much. Captured energies are shares of the optimum. Writes bench/results/speed/bulk_CASE.json, or with
processor time of one thread bulk_CASE_processor.json;
a suffix is for another kind of CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from measuring import interleaved, processor_seconds, save, seconds
from torch import Tensor

from csulora.native import _core

ITERATIONS = (2, 4, 10)
EXPERTS = 16
CASES = {  # rows, columns, k, oversampling of the peer, spectrum
    "matrix": (4096, 4096, 64, 16, "bulk"),
    "tall": (14336, 4096, 64, 16, "bulk"),
    "experts-bulk": (768, 2048, 16, 8, "bulk"),
    "experts-falling": (768, 2048, 16, 8, "falling"),
}

Pair = tuple[Tensor, Tensor]


def orthonormal(rows: int, columns: int) -> Tensor:
    """Return random orthonormal columns."""
    basis: Tensor = torch.linalg.qr(torch.randn(rows, columns))[0]
    return basis


def displacement(rows: int, columns: int, rank: int, spectrum: str) -> Tensor:
    """Return a quarter of ``rank`` signals before a bulk that ends at 1, or singular values i^-1/2."""
    if spectrum == "falling":
        values = torch.arange(1, min(rows, columns) + 1).float().rsqrt()
        return (orthonormal(rows, len(values)) * values) @ orthonormal(columns, len(values)).t()
    values = torch.linspace(3, 1.2, rank // 4)
    bulk = torch.randn(rows, columns) / (math.sqrt(rows) + math.sqrt(columns))
    return bulk + (orthonormal(rows, len(values)) * values) @ orthonormal(columns, len(values)).t()


def pair(rows: int, columns: int, rank: int, spectrum: str) -> Pair:
    """Return two checkpoints in bfloat16 that are small enough for their rounding to lie far below the bulk."""
    moved = displacement(rows, columns, rank, spectrum)
    base = 0.1 * float(moved.square().mean().sqrt()) * torch.randn(rows, columns)
    return base.bfloat16(), (base + moved).bfloat16()


def csulora(pairs: list[Pair], rank: int, workspace: _core.Workspace, auto: bool = False) -> list[_core.Subspace]:
    """Extract one matrix, or many in one call; with ``auto`` what stands out of the bulk, as `--rank auto` does."""
    options = _core.ExtractOptions()
    options.rank, options.above_bulk = rank, auto
    if len(pairs) > 1:
        return _core.extract_subspaces([_core.ExtractTask(*given) for given in pairs], options)
    return [_core.extract_subspace(*pairs[0], options, workspace)]


def svd_lowrank(pairs: list[Pair], q: int, rank: int, iterations: int) -> list[Pair]:
    """Decompose all differences as one batch."""
    differences = torch.stack([aligned.float() - base.float() for base, aligned in pairs])
    u, _, v = torch.svd_lowrank(differences, q=q, niter=iterations)
    return list(zip(u[..., :rank], v[..., :rank], strict=True))


def captured(pairs: list[Pair], factors: list[Pair], rank: int) -> float:
    """Return the least share of the optimal energy that the factors capture."""
    shares = []
    for (base, aligned), (u, v) in zip(pairs, factors, strict=True):
        difference = aligned.float() - base.float()
        tall = difference if difference.shape[0] >= difference.shape[1] else difference.t()
        optimum = float(torch.linalg.eigvalsh((tall.t() @ tall).double())[-rank:].sum())
        left, right = (torch.linalg.qr(factor.float())[0] for factor in (u, v))
        shares.append(float((left.t() @ difference @ right).square().sum()) / optimum)
    return min(shares)


def measured(case: str, repetitions: int, measure: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Time one case, and say what everyone captures."""
    rows, columns, rank, oversampling, spectrum = CASES[case]
    torch.manual_seed(0)
    pairs = [pair(rows, columns, rank, spectrum) for _ in range(EXPERTS if case.startswith("experts") else 1)]
    workspace, q = _core.Workspace(), rank + oversampling
    found = csulora(pairs, rank, workspace)
    shares = {"csulora": captured(pairs, [(subspace.u, subspace.v) for subspace in found], rank)}
    runs: dict[str, Callable[[], object]] = {
        "csulora": lambda: csulora(pairs, rank, workspace),
        "csulora, rank auto": lambda: csulora(pairs, rank, workspace, auto=True),
    }
    for iterations in ITERATIONS:
        name = f"svd_lowrank, {iterations} iterations"
        shares[name] = captured(pairs, svd_lowrank(pairs, q, rank, iterations), rank)
        runs[name] = lambda iterations=iterations: svd_lowrank(pairs, q, rank, iterations)  # type: ignore[misc]
    return {
        "shape": [rows, columns],
        "matrices": len(pairs),
        "rank": rank,
        "q": q,
        "passes": sorted({subspace.certificate.passes for subspace in found}),
        "rank_auto": sorted({len(subspace.s) for subspace in csulora(pairs, rank, workspace, auto=True)}),
        "standing_out": sorted({subspace.certificate.standing_out for subspace in found}),
        "guaranteed_share": min(subspace.certificate.optimal_share for subspace in found),
        "captured_share": shares,
        "seconds": interleaved(runs, repetitions, measure),
    }


def main() -> None:
    """Measure the cases that are asked for, and save each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    measure, suffix = seconds, arguments.suffix
    if arguments.processor_time:
        torch.set_num_threads(1)
        measure, suffix = processor_seconds, f"_processor{suffix}"
    for case in arguments.case:
        results = measured(case, arguments.repetitions, measure)
        print(case, results["passes"], results["captured_share"], results["seconds"])
        save(f"bulk_{case}{suffix}", results)


if __name__ == "__main__":
    main()
