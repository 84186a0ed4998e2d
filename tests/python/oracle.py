"""Dense float64 twins of everything the core computes in factor space."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = ("aligned", "left", "right", "off")


@dataclass(frozen=True)
class Split:
    """An update and its four components, dense, float64."""

    update: Tensor
    components: dict[str, Tensor]

    @property
    def energies(self) -> dict[str, float]:
        # The sum is |dW|^2 for exact projectors; a basis rounded to a storage type is not quite one.
        norms2 = {name: float(component.square().sum()) for name, component in self.components.items()}
        return {name: norm2 / sum(norms2.values()) for name, norm2 in norms2.items()}


def spacings(stored: Tensor) -> Tensor:
    """How far apart storable numbers lie around every entry."""
    format = torch.finfo(stored.dtype)
    powers = stored.double().abs().clamp_min(format.smallest_normal).log2().floor().exp2()
    return format.eps * powers


def rounding_variances(base: Tensor, aligned: Tensor, dim: int) -> Tensor:
    """A bound on the variances of what storage rounding of both adds to aligned - base, summed along a dimension."""
    moved2 = (aligned.double() - base.double()).square()
    one, other = spacings(base).square(), spacings(aligned).square()
    is_near = moved2 < 2 * (one + other)
    on_one_grid = is_near & (one == other)
    near, stepped = ((one * which).sum(dim) for which in (on_one_grid, on_one_grid & (moved2 > 0)))
    q = (stepped / near).nan_to_num().clamp_max(0.5)
    others = torch.where(is_near, (one + other) / 8, (one + other) / 12) * ~on_one_grid
    return others.sum(dim) + near * (q * (1 - q)).clamp_min(1 / 12)


def spectral_edge(rows: Tensor, columns: Tensor) -> float:
    """The largest singular value of a large matrix of independent entries with variances r_i c_j / sum(r)."""
    total = max(rows.sum(), columns.sum()).sqrt()
    a, b = rows * total / rows.sum(), columns * total / columns.sum()

    def z(s: float) -> float:
        t = float((b / (1 - s * b)).sum())
        low: float = float(a.max()) * t
        high: float = low + float(a.sum()) / s
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float((a / (middle - a * t)).sum()) > s else (low, middle)
        return high

    low, high = 0.0, float(1 / b.max())
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if z(left) < z(right) else (left, high)
    return float(z((low + high) / 2) ** 0.5)


def noise_edge(base: Tensor, aligned: Tensor) -> float:
    """What storage rounding of both can make the largest singular value of aligned - base."""
    rows, columns = rounding_variances(base, aligned, dim=1), rounding_variances(base, aligned, dim=0)
    largest_entry = math.sqrt(12 * rows.max() * columns.max() / max(rows.sum(), columns.sum()))
    return max((1 + 2 * math.pow(min(base.shape), -2 / 3)) * spectral_edge(rows, columns), largest_entry)


def update(b: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    return scale * b.double() @ a.double()


def split(dw: Tensor, u: Tensor, v: Tensor) -> Split:
    u, v = u.double(), v.double()
    inside_rows = u @ (u.t() @ dw)
    outside_rows = dw - inside_rows
    aligned = (inside_rows @ v) @ v.t()
    right = (outside_rows @ v) @ v.t()
    components = {"aligned": aligned, "left": inside_rows - aligned, "right": right, "off": outside_rows - right}
    return Split(dw, components)


def gains(penalties: tuple[float, float, float], energies: dict[str, float]) -> dict[str, float]:
    """The closed form g = 1 / (1 + penalty * energy); left and right are one component."""

    def gain(penalty: float, energy: float) -> float:
        return 0.0 if penalty == float("inf") else 1 / (1 + penalty * energy)

    aligned, partial, off = penalties
    shared = gain(partial, energies["left"] + energies["right"])
    return {
        "aligned": gain(aligned, energies["aligned"]),
        "left": shared,
        "right": shared,
        "off": gain(off, energies["off"]),
    }


def closest_safe_update(dw: Tensor, u: Tensor, v: Tensor, penalties: tuple[float, float, float]) -> Tensor:
    components = split(dw, u, v)
    applied = gains(penalties, components.energies)
    return combine(components, applied)


def combine(components: Split, applied: dict[str, float]) -> Tensor:
    return sum(
        (applied[name] * components.components[name] for name in COMPONENTS), torch.zeros_like(components.update)
    )


def objective(x: Tensor, dw: Tensor, u: Tensor, v: Tensor, penalties: tuple[float, float, float]) -> float:
    """|X - dW|^2 + sum_c lambda_c e_c |X_c|^2 for finite penalties, with left and right as one component."""
    energies = split(dw, u, v).energies
    norms2 = {name: float(component.square().sum()) for name, component in split(x, u, v).components.items()}
    aligned, partial, off = penalties
    return (
        float((x - dw).square().sum())
        + aligned * energies["aligned"] * norms2["aligned"]
        + partial * (energies["left"] + energies["right"]) * (norms2["left"] + norms2["right"])
        + off * energies["off"] * norms2["off"]
    )


def undo(dw: Tensor, u: Tensor, s: Tensor, v: Tensor) -> float:
    alignment = (u.double() * s.double()) @ v.double().t()
    return -float((dw * alignment).sum()) / float(s.double().square().sum())


def best_approximation(x: Tensor, rank: int) -> Tensor:
    """The nearest matrix of at most this rank."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    nearest: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return nearest


def orthonormalised(basis: Tensor) -> Tensor:
    """An orthonormal basis, float64, of what a rounded one spans."""
    orthonormal: Tensor = torch.linalg.qr(basis.double()).Q
    return orthonormal


def singular_values(x: Tensor, at_most: int) -> Tensor:
    """The leading singular values of a matrix whose rank is known to be at most `at_most`."""
    if min(x.shape) > 2 * at_most:
        probes = torch.randn(x.shape[1], 2 * at_most, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis, _ = torch.linalg.qr(x @ probes)
        x = basis.t() @ x
    values: Tensor = torch.linalg.svdvals(x)
    return values


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())
