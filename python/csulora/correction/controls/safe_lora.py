"""Safe LoRA (arXiv 2405.16833): project the updates of those modules that are least similar to their projection.

Our reading. V is a module's displacement and C the matrix that projects on its column space. A module's update dW is
replaced by C dW where the cosine of C dW and dW is below a threshold. Two matrices C are known:

- ``exact``: C = V (V^T V)^-1 V^T, which is U U^T for the directions U of the subspace file.
- ``fast``: C = V V^T / |V|, which is U S^2 U^T / |V|. It is no projection: it also scales, by what |V| happens to be.

V is known to the subspace file's rank. Directions beyond that count as outside the column space.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from csulora.adapters.lora import Adapter, LoraModule
from csulora.correction.controls.comparison import compared
from csulora.correction.correct import cover
from csulora.correction.report import Report
from csulora.errors import InputError
from csulora.policy.policy import Policy
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace

Projection = Literal["exact", "fast"]


def safe_lora(
    adapter: Adapter, subspace: Subspace, threshold: float, projection: Projection = "exact"
) -> tuple[Adapter, Report]:
    """Project the updates whose cosine with their projection is below ``threshold``.

    Args:
        adapter: what `csulora.load_adapter` returned; it is not modified.
        subspace: the subspaces of the model the adapter is for.
        threshold: cosines lie in [0, 1]; 0 projects no module, infinity projects all. `cosines` helps to choose.
        projection: ``exact`` or ``fast``, as the module's docstring says.

    Returns:
        The projected adapter, in the input's storage types, and its report, measured in ``subspace``.

    Raises:
        InputError, RefusedError: the threshold is NaN, the projection is unknown, or the adapter does not fit
            ``subspace``.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> projected, report = safe_lora(lora, found, threshold=math.inf)
    >>> round(report.measured[0].gains["right"], 3), round(report.measured[0].gains["aligned"], 3)
    (0.0, 1.0)
    """
    if math.isnan(threshold):
        raise InputError("threshold is NaN; give a cosine in [0, 1], or infinity to project every module")
    modules = {
        name: projected if cosine < threshold else adapter.modules[name]
        for name, (projected, cosine) in _projections(adapter, subspace, projection).items()
    }
    control = {"control": "safe lora", "threshold": threshold, "projection": projection}
    return compared(adapter, replace(adapter, modules=modules, copies={}), subspace, control)


def cosines(adapter: Adapter, subspace: Subspace, projection: Projection = "exact") -> dict[str, float]:
    """Return the cosine of every module's update and its projection, in [0, 1]; 0 where either is 0.

    Raises:
        InputError, RefusedError: the projection is unknown, or the adapter does not fit ``subspace``.

    >>> lora, found = csulora.load_adapter(adapter), csulora.Subspace.open(subspace)
    >>> all(0 <= cosine <= 1 for cosine in cosines(lora, found).values())
    True
    """
    return {name: cosine for name, (_, cosine) in _projections(adapter, subspace, projection).items()}


def _projections(adapter: Adapter, subspace: Subspace, projection: Projection) -> dict[str, tuple[LoraModule, float]]:
    """Every module's projected update, and its cosine with the update."""
    if projection not in ("exact", "fast"):
        raise InputError(f"projection is {projection!r}; it must be exact or fast")
    covered = cover(adapter, subspace, Policy.none())
    return {name: _projected(adapter.modules[name], subspace[target], projection) for name, target in covered.items()}


def _projected(module: LoraModule, subspace: ModuleSubspace, projection: Projection) -> tuple[LoraModule, float]:
    u, b, a = subspace.u.double(), module.b.double() * module.scale, module.a.double()
    weights = torch.ones(subspace.rank, dtype=torch.float64)
    if projection == "fast":
        weights = subspace.s.double() ** 2 / math.sqrt(subspace.certificate.displacement_norm2 or 1.0)
    projected = u @ (weights[:, None] * (u.T @ b))  # (out, r)
    gram = a @ a.T
    norms2 = _inner(b, b, gram) * _inner(projected, projected, gram)
    cosine = _inner(b, projected, gram) / math.sqrt(norms2) if norms2 else 0.0
    return replace(module, b=projected.to(module.b.dtype), scale=1.0), min(1.0, max(0.0, cosine))


def _inner(one: Tensor, other: Tensor, gram: Tensor) -> float:
    """<one a, other a> for gram = a a^T."""
    return float(((one.T @ other) * gram).sum())
