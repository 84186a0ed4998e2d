"""The modules that are corrected, and PyTorch's formulas that corrections are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from csulora.native import _core

Attenuation = _core.Penalties | _core.Components | _core.Directions
PENALTIES = _core.Penalties(0.0, 1.0, 1.0)


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


def mapped(subspace: Path, adapter: Path) -> list[Module]:
    """Map both files, and return their modules."""
    directions, factors = (safe_open(file, framework="pt") for file in (subspace, adapter))
    names = [name.removesuffix(".a") for name in factors.keys() if name.endswith(".a")]  # noqa: SIM118
    return [
        Module(
            *(factors.get_tensor(f"{name}.{factor}") for factor in "ba"),
            *(directions.get_tensor(f"{name}.{factor}") for factor in "usv"),
        )
        for name in names
    ]


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
