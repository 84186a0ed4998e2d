"""Each mistake in saving an adapter has a diagnosis; whoever follows its advice gets an adapter that is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import csulora
import factories
from csulora.adapters.peft import diagnosis

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}
PREFIX = "base_model.model."

Rename = Callable[[str], str]

# What was done to the names, and what undoes it, as the message says.
RENAMED: dict[str, tuple[Rename, Rename, str]] = {
    "torch.compile": (
        lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda name: name.replace("_orig_mod.", ""),
        "torch.compile had wrapped; save the model itself",
    ),
    "FSDP": (
        lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
        lambda name: name.replace("_fsdp_wrapped_module.", ""),
        "FSDP had wrapped; gather and unwrap",
    ),
    "activation checkpointing": (
        lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
        lambda name: name.replace("_checkpoint_wrapped_module.", ""),
        "save the model itself",
    ),
    "data parallelism": (
        lambda name: f"module.{name}",
        lambda name: name.removeprefix("module."),
        "data parallelism had wrapped",
    ),
    "a state dictionary": (
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".default", ""),
        "the adapter's name, 'default', in it",
    ),
    "no prefix": (
        lambda name: name.removeprefix(PREFIX),
        lambda name: PREFIX + name,
        "does not start with base_model.model. once",
    ),
}


def rewrite(path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    weights = path / "adapter_model.safetensors"
    save_file(dict(change(name, tensor.clone()) for name, tensor in load_file(weights).items()), weights)


@pytest.mark.parametrize("mistake", RENAMED)
def test_names(mistake: str, tmp_path: Path) -> None:
    wrong, right, message = RENAMED[mistake]
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    expected = csulora.load_adapter(path).modules.keys()

    rewrite(path, lambda name, tensor: (wrong(name), tensor))
    with pytest.raises(csulora.RefusedError, match=re.escape(message)):
        csulora.load_adapter(path)
    rewrite(path, lambda name, tensor: (right(name), tensor))

    assert csulora.load_adapter(path).modules.keys() == expected


def test_names_that_csulora_reads_have_no_diagnosis() -> None:
    assert diagnosis.of_name(f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight", PREFIX) is None


def test_parameters_that_zero_3_has_spread(tmp_path: Path) -> None:
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    rewrite(path, lambda name, tensor: (name, tensor[:0] if "lora_B" in name else tensor))
    with pytest.raises(csulora.InputError, match=r"is empty, as DeepSpeed's ZeRO-3 .*zero_to_fp32.py"):
        csulora.load_adapter(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "an adapter of mlx-lm"),
        ({"model_type": "llama"}, "the configuration of a model"),
    ],
)
def test_other_configurations(config: dict[str, object], message: str, tmp_path: Path) -> None:
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(csulora.RefusedError, match=message):
        csulora.load_adapter(path)


def test_directories(tmp_path: Path) -> None:
    adapter = factories.save_adapter(tmp_path / "out" / "checkpoint-20", MODULES)
    with pytest.raises(csulora.InputError, match=r"holds directories that are adapters \(checkpoint-20\); name one"):
        csulora.load_adapter(tmp_path / "out")
    assert csulora.load_adapter(adapter).modules.keys() == MODULES.keys()
    (tmp_path / "empty").mkdir()
    with pytest.raises(csulora.InputError, match=r"holds no adapter_config\.json"):
        csulora.load_adapter(tmp_path / "empty")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_of_other_types_are_taken_as_peft_takes_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT computes with them in float32."""
    path = factories.save_adapter(tmp_path / "adapter", MODULES, dtype=torch.float16)
    rewrite(path, lambda name, tensor: (name, tensor.to(dtype) if "lora_A" in name else tensor))
    stored = load_file(path / "adapter_model.safetensors")

    for name, module in csulora.load_adapter(path).modules.items():
        assert module.a.dtype == module.b.dtype == torch.float32
        assert torch.equal(module.a, stored[f"{PREFIX}{name}.lora_A.weight"].float())
        assert torch.equal(module.b, stored[f"{PREFIX}{name}.lora_B.weight"].float())


def test_weight_tying_matters_where_a_tied_layer_is_targeted(tmp_path: Path) -> None:
    path = factories.save_adapter(tmp_path / "plain", MODULES, ensure_weight_tying=True)
    assert csulora.load_adapter(path).modules.keys() == MODULES.keys()
    tied = factories.save_adapter(tmp_path / "tied", MODULES | {"lm_head": (64, 48)}, ensure_weight_tying=True)
    with pytest.raises(csulora.RefusedError, match="ensure_weight_tying is set and lm_head is targeted"):
        csulora.load_adapter(tied)
