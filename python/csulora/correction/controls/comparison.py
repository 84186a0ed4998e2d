"""How any changed adapter compares with the adapter it was made from, measured in one subspace file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from csulora.adapters.lora import REPORT_FILE, Adapter, LoraModule, TextsOnDemand
from csulora.correction.correct import correct
from csulora.correction.report import COMPONENTS, ModuleReport, Report
from csulora.errors import InputError
from csulora.io.files import to_json
from csulora.native import _core
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace


def compared(adapter: Adapter, changed: Adapter, subspace: Subspace, control: dict[str, Any]) -> tuple[Adapter, Report]:
    """Return ``changed`` with its report: what became of ``adapter``'s update, measured in ``subspace``.

    Args:
        adapter: the one before.
        changed: one with the same modules, changed in whatever way.
        subspace: where energies and undo are measured, for controls and policies alike.
        control: what changed it, with its numbers; the report has it in place of a policy.

    Raises:
        InputError, RefusedError: the modules differ, or the adapter does not fit ``subspace``.
    """
    if changed.modules.keys() != adapter.modules.keys():
        raise InputError(f"{adapter.path}: the changed adapter has other modules; compare adapters with the same ones")
    _, before = correct(adapter, subspace, Policy.none())
    _, after = correct(changed, subspace, Policy.none())
    modules = tuple(
        _compared(one, other, adapter.modules[one.module], changed.modules[one.module])
        for one, other in zip(before.modules, after.modules, strict=True)
    )
    report = replace(before, policy=control, modules=modules)
    documents = TextsOnDemand({REPORT_FILE: lambda: to_json(report.to_dict())})
    return replace(changed, documents=documents), report


def _compared(before: ModuleReport, after: ModuleReport, one: LoraModule, other: LoraModule) -> ModuleReport:
    return replace(
        before,
        rank_after=other.rank,
        gains={component: _ratio(_norm_of(after, component), _norm_of(before, component)) for component in COMPONENTS},
        undo_after=after.undo,
        relative_change=_ratio(_distance(one, other), before.norm or 0.0),
    )


def _norm_of(module: ModuleReport, component: str) -> float:
    """|dW_c| of one component."""
    return (module.norm or 0.0) * math.sqrt(max(0.0, (module.energies or {}).get(component, 0.0)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _distance(one: LoraModule, other: LoraModule) -> float:
    """|dW - dW'|, without either product."""
    b = torch.cat([one.b.float() * one.scale, -other.b.float() * other.scale], 1)
    return _core.norm(_core.LoraFactors(b, torch.cat([one.a.float(), other.a.float()]), 1.0))
