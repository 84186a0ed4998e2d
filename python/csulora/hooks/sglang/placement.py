"""Where SGLang puts a corrected adapter's factors, and what has to be true of them there.

SGLang finds a layer by the first ``layers.N`` in a name, and the module by a part of the rest. It compares neither with
the names of the model's own modules, and reads one rank from the configuration.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from csulora.adapters.lora import Adapter
from csulora.errors import HostLimitError
from csulora.models.names import bare, with_known_projection

_LAYER = re.compile(r"layers\.(\d+)\.")
_ROUTERS = (".gate", ".router")
_OUTSIDE_LAYERS = frozenset({"embed_tokens", "lm_head"})


def fitted(adapter: Adapter) -> Adapter:
    """Return the same updates as SGLang applies them to the modules that they were corrected for.

    Raises:
        RefusedError: SGLang would put a module's factors into another module, or has none for them.
    """
    for name in adapter.modules:
        if name.endswith(_ROUTERS):
            raise HostLimitError(
                f"{adapter.path}: SGLang has no LoRA for a router, {name}; use an adapter that does not target it"
            )
    slots: dict[tuple[str, str], str] = {}
    for name in adapter.modules:
        layer = _LAYER.match(bare(name))
        if layer is None and bare(name) not in _OUTSIDE_LAYERS:
            raise HostLimitError(
                f"{adapter.path}: SGLang takes {name} for a module of the language model's layers, which it is not; "
                "drop it (drop_uncovered, or an adapter without it)"
            )
        if layer is not None and ".experts." not in name:
            first = slots.setdefault((layer[1], name.rpartition(".")[2]), name)
            if first != name:
                raise HostLimitError(f"{adapter.path}: SGLang puts {first} and {name} into one module")
    # SGLang reads w1, but does not know it in a configuration.
    modules = {with_known_projection(name): module for name, module in adapter.modules.items()}
    is_renamed = modules.keys() != adapter.modules.keys()
    return _with_uniform_rank(replace(adapter, modules=modules, partial=adapter.partial or is_renamed))


def _with_uniform_rank(adapter: Adapter) -> Adapter:
    """Pad factors with zeros, so that all have one rank."""
    rank = max(module.rank for module in adapter.modules.values())
    modules = {
        name: replace(
            module,
            b=torch.nn.functional.pad(module.b, (0, rank - module.rank)),
            a=torch.nn.functional.pad(module.a, (0, 0, 0, rank - module.rank)),
        )
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)
