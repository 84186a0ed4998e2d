import pytest

from csulora.models import names

LLAMA = "model.layers.0.self_attn.q_proj"
ATTENTION_AND_MLP = [
    LLAMA,
    "model.layers.11.mlp.gate_up_proj",
    "model.layers.0.block_sparse_moe.experts.7.w1",
    "h.0.attn.c_attn",
    "transformer.h.3.mlp.c_fc",
    "gpt_neox.layers.2.attention.query_key_value",
]
OTHERS = ["model.embed_tokens", "lm_head", "wte", "transformer.wpe", "encoder.block.0.layer.0.relative_attention_bias"]


@pytest.mark.parametrize("module", ATTENTION_AND_MLP)
def test_matrices_of_numbered_layers_are_attention_and_mlp(module: str) -> None:
    assert names.is_attention_or_mlp(module)


@pytest.mark.parametrize("module", OTHERS)
def test_embeddings_and_heads_are_not(module: str) -> None:
    assert not names.is_attention_or_mlp(module)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (LLAMA, LLAMA),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("layers.0.self_attn.q_proj", LLAMA),
    ],
)
def test_finds_a_module_up_to_the_bare_models_prefix(module: str, known: str) -> None:
    assert names.resolve(module, {known, "other"}, {}) == known


@pytest.mark.parametrize("module", ["q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "x" + LLAMA, ""])
def test_never_guesses_a_module(module: str) -> None:
    assert names.resolve(module, {LLAMA}, {}) is None


def test_a_whole_name_comes_before_a_name_up_to_the_prefix() -> None:
    assert names.resolve("model.h.0.mlp", {"h.0.mlp", "model.h.0.mlp"}, {}) == "model.h.0.mlp"


def test_resolves_names_of_tied_weights() -> None:
    known, aliases = {"model.embed_tokens"}, {"lm_head": "model.embed_tokens"}
    assert names.resolve("lm_head", known, aliases) == "model.embed_tokens"
    assert names.resolve("lm_head", known | {"lm_head"}, aliases) == "lm_head"
    assert names.resolve("lm_heads", known, aliases) is None


def test_only_models_built_of_conv1d_store_weights_transposed() -> None:
    gpt2 = {"h.0.attn.c_attn": (4, 12), "h.0.attn.c_proj": (4, 4), "h.0.mlp.c_proj": (16, 4), "wte": (9, 40)}
    assert names.conv1d(gpt2) == set(gpt2) - {"wte"}
    decoder = {f"decoder.transformer.{name}": shape for name, shape in gpt2.items()} | {"encoder.query": (4, 12)}
    assert names.conv1d(decoder) == {f"decoder.transformer.{name}" for name in gpt2 if name != "wte"}
    bigcode = {"h.0.attn.c_attn": (6, 4), "h.0.attn.c_proj": (4, 4), "h.0.mlp.c_proj": (4, 16), "wte": (9, 40)}
    assert names.conv1d(bigcode) == set()


def test_recognises_the_token_embedding() -> None:
    assert names.token_embedding(["model.layers.0.mlp", "model.embed_tokens"]) == "model.embed_tokens"
    assert names.token_embedding(["wpe", "wte"]) == "wte"
    assert names.token_embedding([LLAMA, "wpe"]) is None
    assert names.token_embedding(["audio.embed_tokens", "language.embed_tokens"]) is None
