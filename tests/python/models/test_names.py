import pytest

from csulora.models import names

LINEAR = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.block_sparse_moe.experts.7.w1",
    "model.layers.0.mlp.gate",
    "h.0.attn.c_attn",
    "gpt_neox.layers.2.attention.query_key_value",
    "visual.merger.mlp.0",
    "model.embed_vision.embedding_projection",
    "model.language_model.per_layer_model_projection",
    "model.altup_projections.0",
    "model.vision_tower.embeddings.patch_embedding",
]
EMBEDDINGS = ["model.embed_tokens", "wte", "transformer.wpe", "model.embed_tokens_per_layer", "visual.pos_embed"]
EMBEDDINGS += [
    "shared",
    "encoder.block.0.layer.0.relative_attention_bias",
    "vision_model.embeddings.position_embedding",
]


@pytest.mark.parametrize(
    ("kind", "modules"), [("linear", LINEAR), ("embedding", EMBEDDINGS), ("head", ["lm_head", "embed_out"])]
)
def test_kinds_of_matrices(kind: str, modules: list[str]) -> None:
    assert [names.kind_of(module) for module in modules] == [kind] * len(modules)


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
    assert names.token_embedding(["model.layers.0.mlp", "wpe"]) is None
    assert names.token_embedding(["audio.embed_tokens", "language.embed_tokens"]) is None
