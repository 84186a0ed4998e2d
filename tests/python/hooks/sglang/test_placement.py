"""What SGLang is given; it needs no SGLang."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
from csulora.hooks.sglang.placement import fitted

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


def test_all_modules_get_one_rank(tmp_path: Path) -> None:
    """SGLang takes as many rows of every factor as the configuration's rank says."""
    path = factories.save_adapter(tmp_path / "adapter", MODULES, rank=4)
    tensors = load_file(path / "adapter_model.safetensors")
    narrow = {name: t[:2] if "lora_A" in name else t[:, :2] for name, t in tensors.items() if "q_proj" in name}
    save_file({name: t.contiguous() for name, t in (tensors | narrow).items()}, path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text()) | {"rank_pattern": {"q_proj": 2}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    mixed = csulora.load_adapter(path)

    uniform = fitted(mixed)

    assert {module.rank for module in mixed.modules.values()} == {2, 4}
    assert {module.rank for module in uniform.modules.values()} == {4}
    for name, module in mixed.modules.items():
        assert torch.equal(uniform.modules[name].b @ uniform.modules[name].a, module.b @ module.a)
        assert uniform.modules[name].scale == module.scale


@pytest.mark.parametrize(
    "name",
    [
        "model.mtp_layers.0.mlp.down_proj",
        "mtp.layers.0.mlp.down_proj",
        "vision_tower.encoder.layers.0.mlp.down_proj",
        "model.visual.merger.down_proj",
    ],
)
def test_what_sglang_would_put_into_another_layer_is_refused(name: str, tmp_path: Path) -> None:
    adapter = csulora.load_adapter(factories.save_adapter(tmp_path / "adapter", MODULES | {name: (48, 64)}))
    with pytest.raises(csulora.RefusedError, match=f"SGLang takes {name} for a module of the language model"):
        fitted(adapter)


def test_two_modules_in_one_place_are_refused(tmp_path: Path) -> None:
    both = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.0.cross_attn.q_proj": (48, 48)}
    adapter = csulora.load_adapter(factories.save_adapter(tmp_path / "adapter", both))
    with pytest.raises(csulora.RefusedError, match="into one module"):
        fitted(adapter)


def test_wrappers_of_the_language_model_do_not_matter(tmp_path: Path) -> None:
    names = {"model.language_model.layers.0.mlp.up_proj": (48, 48), "lm_head": (48, 48)}
    adapter = csulora.load_adapter(factories.save_adapter(tmp_path / "adapter", names))
    assert fitted(adapter).modules.keys() == names.keys()


def test_a_router_is_refused() -> None:
    with pytest.raises(csulora.RefusedError, match=r"SGLang has no LoRA for a router, model\.layers\.0\.mlp\.gate"):
        fitted(factories.adapter(MODULES | {"model.layers.0.mlp.gate": (4, 48)}))


def test_projections_of_experts_have_the_names_that_configurations_may_have() -> None:
    found = fitted(factories.adapter({"model.layers.0.block_sparse_moe.experts.0.w1": (64, 48)}))
    assert list(found.modules) == ["model.layers.0.block_sparse_moe.experts.0.gate_proj"]
