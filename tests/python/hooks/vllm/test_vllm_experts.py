"""What csulora knows of vLLM's experts and routers; `tests/vllm/test_experts.py` serves them."""

from types import SimpleNamespace

import pytest

import csulora
import factories
from csulora.hooks.vllm import experts

ROUTER = "model.layers.0.mlp.gate"
MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), ROUTER: (4, 16)}


class FusedForCausalLM:
    is_3d_moe_weight = True


class MixtralForCausalLM: ...


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's configuration of a model of a class."""
    monkeypatch.setattr(experts, "_model_class", lambda config: request.param)
    return SimpleNamespace(lora_config=SimpleNamespace(enable_moe_shared_loras=False))


@pytest.mark.parametrize(
    ("served", "layout"), [(FusedForCausalLM, "fused"), (MixtralForCausalLM, "per-expert")], indirect=["served"]
)
def test_the_model_class_decides_on_the_layout(served: SimpleNamespace, layout: str) -> None:
    assert experts.layout_of(served) == layout


@pytest.mark.parametrize("served", [FusedForCausalLM], indirect=True)
def test_shared_factors_are_refused(served: SimpleNamespace) -> None:
    served.lora_config.enable_moe_shared_loras = True
    with pytest.raises(csulora.RefusedError, match="--enable-moe-shared-loras; serve without it"):
        experts.layout_of(served)


@pytest.mark.parametrize("served", [FusedForCausalLM], indirect=True)
def test_a_router_that_is_ignored_is_refused_or_left_out_by_name(served: SimpleNamespace) -> None:
    adapter = factories.adapter(MODULES)
    with pytest.raises(csulora.RefusedError, match=rf"vLLM ignores the update of {ROUTER}, a router; name it"):
        experts.without_ignored(adapter, served, csulora.Policy.none())
    found = experts.without_ignored(adapter, served, csulora.Policy.none(drop_uncovered=("*.mlp.gate",)))
    assert list(found.modules) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("served", [MixtralForCausalLM], indirect=True)
def test_a_router_that_is_applied_stays(served: SimpleNamespace) -> None:
    adapter = factories.adapter(MODULES)
    assert experts.without_ignored(adapter, served, csulora.Policy.none()) is adapter
