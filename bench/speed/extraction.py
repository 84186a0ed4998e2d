"""Extraction of one matrix beside torch.linalg.svd, torch.svd_lowrank and scikit-learn's randomized_svd.

    python bench/speed/extraction.py --rows 4096 --spectrum falling [--repetitions 5] [--without-svd] [--suffix S]

The displacement has known singular vectors, and everyone is tuned to miss at most 1e-3 of the leading 64 on either
side: the peers by oversampling and iterations, the cheapest first; csulora by its tolerance, and once more with its
defaults. Everyone starts from both matrices and forms their difference in memory that is there already, as
`csulora.extract` does from its second matrix on. csulora's time includes the certificate, which the peers do without. A
full SVD is timed once.

The floor of csulora's time is the difference alone, timed, its passes over the matrix at the rate of the faster of
float32's and bfloat16's large square products, and the certificate's two products in float32. Writes
bench/results/speed/extraction_ROWS_SPECTRUM.json, with a suffix for another kind of CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import GEMM_FLOPS, gemm, interleaved, save, seconds, summary
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from csulora.native import _core

RANK = 64
COLUMNS = 4096
BLOCK = RANK // 2  # extract.cpp's columns of the start block on a CPU
LARGEST_SUBSPACE_ERROR = 1e-3
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 0.003)
DEFAULT_TOLERANCE = 1e-3
SETTINGS = sorted(  # columns of the sketch and iterations, by what their products cost
    ((q, iterations) for q in (80, 128, 192) for iterations in (1, 2, 3, 4, 8)),
    key=lambda setting: setting[0] * (2 + 2 * setting[1]),
)
SPECTRA = {
    "falling": torch.arange(1, COLUMNS + 1).double().rsqrt(),
    "floor": torch.cat([torch.linspace(1, 0.2, RANK), torch.linspace(0.05, 0.005, COLUMNS - RANK)]).double(),
}

Factors = tuple[Tensor, Tensor]  # u (m, k) and v (n, k)


def cosines(size: int) -> Tensor:
    """Return the orthonormal matrix of the discrete cosine transform, columns as vectors."""
    index = torch.arange(size).double()
    matrix = torch.cos(torch.pi / size * (index[:, None] + 0.5) * index) * (2 / size) ** 0.5
    matrix[:, 0] /= 2**0.5
    basis: Tensor = matrix.float()
    return basis


def subspace_error(true: Tensor, found: Tensor) -> float:
    """1 - |true^T found|^2 / k."""
    basis, _ = torch.linalg.qr(found.double())
    return 1 - float((true.double().t() @ basis).square().sum()) / true.shape[1]


class Case:
    """A displacement, and who decomposes it how."""

    def __init__(self, rows: int, spectrum: str) -> None:
        """Make the matrix from its singular vectors."""
        left, right = cosines(rows)[:, :COLUMNS], cosines(COLUMNS).flip(0)
        self.aligned = (left * SPECTRA[spectrum].float()) @ right.t()
        self.base = torch.zeros_like(self.aligned)
        self.difference, self.workspace = torch.empty_like(self.aligned), _core.Workspace()
        self.left, self.right = left[:, :RANK].clone(), right[:, :RANK].clone()

    def csulora(self, tolerance: float) -> _core.Subspace:
        """From both matrices to certified factors, every direction of which has converged."""
        options = _core.ExtractOptions()
        options.rank, options.tolerance, options.energy_tolerance = RANK, tolerance, 0.0
        return _core.extract_subspace(self.base, self.aligned, options, self.workspace)

    def subtract(self) -> Tensor:
        """Form the difference."""
        return torch.sub(self.aligned, self.base, out=self.difference)

    def svd_lowrank(self, q: int, iterations: int) -> Factors:
        """Decompose the difference with torch."""
        u, _, v = torch.svd_lowrank(self.subtract(), q=q, niter=iterations)
        return u[:, :RANK], v[:, :RANK]

    def randomized_svd(self, q: int, iterations: int) -> Factors:
        """Decompose the difference with scikit-learn."""
        matrix = self.subtract().numpy()
        u, _, vt = randomized_svd(matrix, RANK, n_oversamples=q - RANK, n_iter=iterations, random_state=0)
        return torch.from_numpy(np.ascontiguousarray(u)), torch.from_numpy(np.ascontiguousarray(vt.T))

    def subspace_error(self, factors: Factors) -> float:
        """Return the share of the true subspaces that is missed, of the worse side."""
        return max(subspace_error(self.left, factors[0]), subspace_error(self.right, factors[1]))


def tuned(case: Case, peer: Callable[[int, int], Factors]) -> dict[str, Any]:
    """Return the cheapest setting that is accurate enough; fail if there is none."""
    for q, iterations in SETTINGS:
        share = case.subspace_error(peer(q, iterations))
        if share <= LARGEST_SUBSPACE_ERROR:
            return {"q": q, "iterations": iterations, "subspace_error": share}
    raise SystemExit(f"{peer.__name__} does not reach a subspace error of {LARGEST_SUBSPACE_ERROR}")


def tuned_csulora(case: Case) -> dict[str, Any]:
    """Return the loosest tolerance that is accurate enough."""
    for tolerance in TOLERANCES:
        found = case.csulora(tolerance)
        share = case.subspace_error((found.u, found.v))
        if share <= LARGEST_SUBSPACE_ERROR:
            return {"tolerance": tolerance, "subspace_error": share, "passes": found.certificate.passes}
    raise SystemExit(f"csulora does not reach a subspace error of {LARGEST_SUBSPACE_ERROR}")


def operations(rows: int, passes: int) -> float:
    """Operations of csulora's matrix products, those in float64 counted once."""
    block, blocks = BLOCK, (passes - 1) // 2
    products = passes * 2 * rows * COLUMNS * block
    sweeps = sum(
        4 * length * block * (block * (index > 0) + block * index)  # against the last block and against all
        + 2 * 4 * length * block**2  # Gram matrix and triangle, twice
        for length, count in ((rows, blocks), (COLUMNS, blocks + 1))
        for index in range(count)
    )
    combination = 2 * (rows + COLUMNS) * block * blocks * RANK
    return products + sweeps + combination + certificate_operations(rows)


def certificate_operations(rows: int) -> float:
    """Operations of a product of the matrix with every factor."""
    return 4 * rows * COLUMNS * RANK


def floor(rows: int, passes: int, times: dict[str, dict[str, Any]]) -> float:
    """The seconds that csulora's algorithm cannot do without, from what was measured in the same run."""
    gemm = times["gemm"]["median"]
    products = 2 * rows * COLUMNS * BLOCK * passes
    return float(
        times["difference"]["median"]
        + products / GEMM_FLOPS * min(gemm, times.get("bfloat16 gemm", times["gemm"])["median"])
        + certificate_operations(rows) / GEMM_FLOPS * gemm
    )


def main() -> None:
    """Tune, measure and save one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--spectrum", choices=sorted(SPECTRA), required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--without-svd", action="store_true")
    parser.add_argument("--suffix", default="")
    arguments = parser.parse_args()
    case = Case(arguments.rows, arguments.spectrum)
    ours = tuned_csulora(case)
    default = case.csulora(DEFAULT_TOLERANCE)
    lowrank, sklearn = tuned(case, case.svd_lowrank), tuned(case, case.randomized_svd)
    settings = {
        "csulora": ours,
        "csulora, defaults": {
            "tolerance": DEFAULT_TOLERANCE,
            "subspace_error": case.subspace_error((default.u, default.v)),
            "passes": default.certificate.passes,
        },
        "svd_lowrank": lowrank,
        "randomized_svd": sklearn,
    }
    times = interleaved(
        {
            "gemm": gemm(),
            **({"bfloat16 gemm": gemm(torch.bfloat16)} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {}),
            "difference": case.subtract,
            "csulora": lambda: case.csulora(ours["tolerance"]),
            "csulora, defaults": lambda: case.csulora(DEFAULT_TOLERANCE),
            "svd_lowrank": lambda: case.svd_lowrank(lowrank["q"], lowrank["iterations"]),
            "randomized_svd": lambda: case.randomized_svd(sklearn["q"], sklearn["iterations"]),
        },
        arguments.repetitions,
    )
    if not arguments.without_svd:
        times["svd"] = summary([seconds(lambda: torch.linalg.svd(case.subtract(), full_matrices=False))])
    rate = GEMM_FLOPS / times["gemm"]["median"]
    passes = {name: settings[name]["passes"] for name in ("csulora", "csulora, defaults")}
    shares = {name: operations(arguments.rows, count) / times[name]["median"] / rate for name, count in passes.items()}
    results = {
        "rows": arguments.rows,
        "columns": COLUMNS,
        "rank": RANK,
        "spectrum": arguments.spectrum,
        "settings": settings,
        "seconds": times,
        "gemm_flops_per_second": rate,
        "share_of_gemm_rate": shares,
        "floor_seconds": {name: floor(arguments.rows, count, times) for name, count in passes.items()},
    }
    save(f"extraction_{arguments.rows}_{arguments.spectrum}{arguments.suffix}", results)


if __name__ == "__main__":
    main()
