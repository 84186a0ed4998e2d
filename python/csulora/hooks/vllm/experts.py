"""What vLLM makes of updates of experts and of the routers that choose among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from csulora.adapters.expert_encoding import FUSED, PER_EXPERT, Layout
from csulora.adapters.lora import Adapter
from csulora.errors import HostLimitError
from csulora.policy.policy import Policy

_ROUTERS = {"gate": "a router", "router": "a router", "shared_expert_gate": "the gate of a shared expert"}

# Classes that call their router themselves, and so the LoRA layer around it; run. Others hand it to the layer of the
# experts before that (Qwen 3 MoE: run), and its update has no effect. So it is with the gate of a shared expert
# (Qwen 2 MoE: run).
_CALL_THEIR_ROUTER = frozenset({"MixtralForCausalLM"})


def layout_of(config: Any) -> Layout:
    """Return in which layout the served model reads updates of experts: vLLM asks its class the same.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        RefusedError: the server reads them in another way than these two.
    """
    if config.lora_config.enable_moe_shared_loras:
        raise HostLimitError(
            "vLLM takes the factors of experts for shared ones under --enable-moe-shared-loras; serve without it"
        )
    return FUSED if getattr(_model_class(config), "is_3d_moe_weight", False) else PER_EXPERT


def without_ignored(adapter: Adapter, config: Any, policy: Policy) -> Adapter:
    """Return what vLLM applies: all of a corrected adapter, or all but routers that the policy drops by name.

    Raises:
        RefusedError: it updates a router, vLLM would ignore that, and the policy does not name it.
    """
    routers = [name for name in adapter.modules if name.rpartition(".")[2] in _ROUTERS]
    if not routers or _model_class(config).__name__ in _CALL_THEIR_ROUTER:
        return adapter
    for name in routers:
        if policy.fate_of(name) != "drop":
            raise HostLimitError(
                f"{adapter.path}: vLLM ignores the update of {name}, {_ROUTERS[name.rpartition('.')[2]]}; name it in "
                "the policy's drop_uncovered to serve the adapter without it"
            )
    modules = {name: module for name, module in adapter.modules.items() if name not in routers}
    return replace(adapter, modules=modules, partial=True)


def _model_class(config: Any) -> type:
    from vllm.model_executor.model_loader.utils import get_model_cls

    found: type = get_model_cls(config.model_config)
    return found
