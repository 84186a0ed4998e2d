import pytest

from csulora.errors import RefusedError
from csulora.models import gguf_layout

SUPPORTED = [
    "falcon-h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm4",
    "glm4moe",
    "gpt-oss",
    "granite",
    "granitemoe",
    "jamba",
    "lfm2",
    "lfm2moe",
    "llama",
    "llama4",
    "mistral3",
    "nemotron_h_moe",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen35",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vl",
    "smollm3",
]


def test_every_architecture_has_a_model_that_proves_it() -> None:
    """What supports them is test_gguf_llama_cpp.py, which goes through the zoo."""
    zoo = pytest.importorskip("gguf_zoo")
    assert {family.architecture for family in zoo.FAMILIES.values()} == set(SUPPORTED)
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


@pytest.mark.parametrize("name", [None, "mamba", "Llama", "dbrx", "x\n" * 100])
def test_refuses_other_architectures_by_name(name: str | None) -> None:
    with pytest.raises(
        RefusedError, match=r"file: architecture .* supported are falcon-h1, gemma, .*, smollm3$"
    ) as caught:
        gguf_layout.architecture(name, "file")
    assert repr(name)[:60] in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 1},
        {"model_type": ["llama"]},
        {"model_type": "gemma3"},
        {"model_type": "dbrx"},
        {"model_type": "nemotron_h"},
        {"model_type": "deepseek_v3"},
        {"model_type": "gemma3_text", "text_config": {"model_type": "llama"}},
        {"model_type": "mistral3", "text_config": {"model_type": "mistral4"}},
        {"model_type": "llama", "text_config": {}},
    ],
)
def test_refuses_other_model_types_by_name(config: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match="no GGUF layout is supported for model_type"):
        gguf_layout.architecture_of_config(config, "config.json")


@pytest.mark.parametrize(
    ("name", "model_type", "ignored"),
    [
        ("deepseek2", "deepseek_v3", "q_a_proj, q_b_proj and kv_a_proj_with_mqa"),
        ("gemma3n", "gemma3n_text", "altup_projections"),
        ("kimi-linear", "kimi_linear", "attention projections"),
    ],
)
def test_says_what_llama_cpp_ignores(name: str, model_type: str, ignored: str) -> None:
    with pytest.raises(RefusedError, match=f"file: architecture '{name}' .* ignores updates of its {ignored}.*merge"):
        gguf_layout.architecture(name, "file")
    with pytest.raises(RefusedError, match=f"model_type '{model_type}'.* ignores updates of its {ignored}.*merge"):
        gguf_layout.architecture_of_config({"model_type": model_type}, "config.json")


def test_a_model_that_sees_is_its_language_model() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert gguf_layout.architecture_of_config(config, "config.json").name == "gemma3"
