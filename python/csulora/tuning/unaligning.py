"""Adapters that undo alignment on purpose: a policy for adapters to come is fitted to stop them as well.

Three adapters show few of the ways in which an update can undo alignment. So each adapter that such a policy is fitted
on comes a second time, with some of the displacement subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from csulora.adapters.lora import Adapter, LoraModule
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace


def unaligning(
    adapter: Adapter, subspace: Subspace, targets: Mapping[str, str], directions: int, share: float
) -> Adapter:
    """Return an adapter whose update is dW - ``share`` U S V^T along so many leading directions, in float32.

    ``targets``: module in the model -> module in the subspace file; all others stay as they are.
    """
    modules = {
        name: _unaligning(module, subspace[targets[name]], directions, share) if name in targets else module
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _unaligning(module: LoraModule, known: ModuleSubspace, directions: int, share: float) -> LoraModule:
    u, s, v = (each[..., :directions].float() for each in (known.u, known.s, known.v))
    b = torch.cat([module.b.float() * module.scale, -share * u * s], 1)
    return LoraModule(b, torch.cat([module.a.float(), v.T]))
