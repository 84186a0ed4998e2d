import pytest
import torch

import factories
from csulora.errors import RefusedError
from csulora.models import gguf_layout
from csulora.models.gguf_layout import from_rotary_order, to_rotary_order

SUPPORTED = ["gemma", "gemma2", "gemma3", "granite", "llama", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"]


def test_every_architecture_has_a_model_that_proves_it() -> None:
    """What supports them is test_gguf_llama_cpp.py, which goes through the zoo."""
    zoo = pytest.importorskip("gguf_zoo")
    assert {family.gguf_name for family in zoo.FAMILIES.values()} == set(SUPPORTED)
    assert set(gguf_layout._ARCHITECTURES) == set(SUPPORTED)


@pytest.mark.parametrize("name", SUPPORTED)
def test_names_go_both_ways(name: str) -> None:
    architecture = gguf_layout.architecture(name, "file")
    modules = [f"model.layers.{layer}.{part}" for layer in (0, 7, 123) for part in architecture.parts]
    for module in [*modules, "model.embed_tokens", "lm_head"]:
        tensor = architecture.tensor_name(module)
        assert tensor is not None
        assert architecture.module_name(tensor) == module
    assert len({architecture.tensor_name(module) for module in modules}) == len(modules)


def test_names_are_llama_cpps() -> None:
    llama, phi3 = (gguf_layout.architecture(name, "file") for name in ("llama", "phi3"))
    assert llama.tensor_name("model.layers.3.self_attn.o_proj") == "blk.3.attn_output"
    assert phi3.tensor_name("model.layers.3.self_attn.qkv_proj") == "blk.3.attn_qkv"
    assert phi3.tensor_name("model.layers.3.mlp.gate_up_proj") == "blk.3.ffn_up"
    assert llama.tensor_name("lm_head") == "output"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blk.0",
        "blk.0.attn_q.weight",
        "blk.01.attn_q",
        "blk.0.attn_norm",
        "token_embd.0",
        "self_attn.q_proj",
        "attn_q",
    ],
)
def test_other_names_belong_to_no_module(name: str) -> None:
    architecture = gguf_layout.architecture("llama", "file")
    assert architecture.module_name(name) is None
    assert architecture.tensor_name(name) is None


def test_names_of_one_side_are_none_of_the_other() -> None:
    architecture = gguf_layout.architecture("llama", "file")
    assert architecture.tensor_name("blk.0.attn_q") is architecture.tensor_name("token_embd") is None
    assert architecture.module_name("model.layers.0.self_attn.q_proj") is architecture.module_name("lm_head") is None


def test_rows_are_paired_as_they_are_rotated() -> None:
    rows = torch.arange(12).reshape(12, 1)  # two heads of six rows: 0 is rotated together with 3
    assert to_rotary_order(rows, heads=2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_row_orders_are_inverse(heads: int) -> None:
    matrix = factories.gaussian(24, 5, seed=0)
    assert torch.equal(from_rotary_order(to_rotary_order(matrix, heads), heads), matrix)
    assert torch.equal(to_rotary_order(from_rotary_order(matrix, heads), heads), matrix)


@pytest.mark.parametrize("name", [None, "mamba", "Llama", "llama4", "gemma3n", "qwen2moe", "x\n" * 100])
def test_refuses_other_architectures_by_name(name: str | None) -> None:
    with pytest.raises(RefusedError, match=r"file: architecture .* supported are gemma, .*, smollm3$") as caught:
        gguf_layout.architecture(name, "file")
    assert repr(name)[:60] in str(caught.value)


@pytest.mark.parametrize("model_type", [None, 1, ["llama"], "gemma3", "mixtral", "qwen3_moe"])
def test_refuses_other_model_types_by_name(model_type: object) -> None:
    with pytest.raises(RefusedError, match="no GGUF layout is known for model_type"):
        gguf_layout.architecture_of_model_type(model_type, "config.json")
