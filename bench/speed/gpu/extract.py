"""Extraction of all 224 matrices of the Llama-3-8B shape on one GPU, both checkpoints resident in bfloat16.

    python bench/speed/gpu/extract.py [--layers 32] [--rank 64] [--threads 8] [--json FILE]

Displacements have singular values i^-0.5 up to i = 512 and noise behind them. Every certificate must meet the
tolerance, and a small matrix's subspace must agree with an SVD in float64, or nothing is reported. Measured with
several threads, and once with one; a layer for each thread is extracted first and does not count. The floor is the
larger of the time of the products with D that were made, at the float32 GEMM rate, and of the bytes they read, at the
bandwidth, both measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import LAYER, bandwidth, gemm_rate, machine, seconds, shapes, write
from torch import Tensor

from csulora.native import _core

RESIDUAL = 2e-3  # the tolerance of 1e-3, and what storing factors in float16 adds
SUBSPACE_ERROR = 1e-3
OVERSAMPLING = 16


def matrix_pair(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a base matrix and one displaced from it."""
    base = 0.02 * torch.randn(rows, columns, device="cuda")
    values = torch.arange(1, 513, device="cuda").float().rsqrt()
    left, right = (torch.randn(size, 512, device="cuda") / size**0.5 for size in (rows, columns))
    displacement = (left * values) @ right.t() + 1e-4 * torch.randn(rows, columns, device="cuda")
    return base.bfloat16(), (base + displacement).bfloat16()


def _take_stream() -> None:
    torch.cuda.set_stream(torch.cuda.Stream())


def on_streams(threads: int) -> ThreadPoolExecutor:
    """Return threads with a stream each: one alone leaves the GPU idle between small steps."""
    return ThreadPoolExecutor(threads, initializer=_take_stream)


def check(subspaces: list[_core.Subspace], rank: int, smallest: tuple[Tensor, Tensor]) -> float:
    """Return the largest residual; stops unless all are as they should be."""
    residual = max(subspace.certificate.residual for subspace in subspaces)
    if residual > RESIDUAL or any(subspace.u.shape[1] != rank for subspace in subspaces):
        raise SystemExit(f"a certificate does not meet the tolerance: residual {residual:.1e}")
    base, aligned = smallest
    options = _core.ExtractOptions()
    options.rank = rank
    found = _core.extract_subspace(base, aligned, options)
    true, _, _ = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    basis, _ = torch.linalg.qr(found.u.double())
    subspace_error = 1 - float((true[:, :rank].t() @ basis).square().sum()) / rank
    if subspace_error > SUBSPACE_ERROR:
        raise SystemExit(f"{subspace_error:.1e} of the true subspace is missed")
    return residual


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = _core.ExtractOptions()
    options.rank = arguments.rank
    matrices = [matrix_pair(*shape) for shape in shapes(arguments.layers)]
    torch.cuda.synchronize()  # the threads' streams do not wait for this one's
    times: dict[int, list[float]] = {}
    subspaces: list[_core.Subspace] = []

    def run(pool: ThreadPoolExecutor, count: int) -> None:
        subspaces[:] = pool.map(lambda both: _core.extract_subspace(both[0], both[1], options), matrices[:count])

    for threads, repeats in {1: 1, arguments.threads: arguments.repeats}.items():
        with on_streams(threads) as pool:  # whose streams keep the memory that they were given
            run(pool, threads * len(LAYER))
            times[threads] = sorted(seconds(partial(run, pool, len(matrices))) for _ in range(repeats))
    residual = check(subspaces, arguments.rank, min(matrices, key=lambda both: both[0].numel()))

    entries = [
        base.numel() * subspace.certificate.passes for (base, _), subspace in zip(matrices, subspaces, strict=True)
    ]
    operations = 2 * (arguments.rank + OVERSAMPLING) * sum(entries)
    copy, rate = bandwidth(), gemm_rate(torch.float32)
    bound = max(operations / rate, 4 * sum(entries) / copy)
    medians = {threads: statistics.median(measured) for threads, measured in times.items()}
    write(
        {
            **machine(),
            "matrices": len(matrices),
            "rank": arguments.rank,
            "seconds_by_threads": times,
            "median_seconds_by_threads": medians,
            "passes": sorted({subspace.certificate.passes for subspace in subspaces}),
            "largest_residual": residual,
            "bandwidth_bytes_per_second": copy,
            "float32_gemm_operations_per_second": rate,
            "floor_seconds": bound,
            "times_floor": min(medians.values()) / bound,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
