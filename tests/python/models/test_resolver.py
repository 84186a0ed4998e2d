from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora.errors import RefusedError
from csulora.models.resolver import Resolved, Resolver

LLAMA = "model.layers.0.self_attn.q_proj"
LANGUAGE_WRAPPERS = ["", "model.", "language_model.", "language_model.model.", "model.language_model.", "backbone."]
TOWERS = ["visual", "vision_tower", "vision_tower.vision_model.encoder", "vision_model", "audio_tower", "encoder"]


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (LLAMA, LLAMA),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("layers.0.self_attn.q_proj", LLAMA),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    ],
)
def test_finds_a_module_up_to_its_wrappers(module: str, known: str) -> None:
    assert Resolver([known, "other"]).resolve(module) == Resolved(known, False)


@pytest.mark.parametrize("module", ["q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "x" + LLAMA, ""])
def test_never_guesses_a_module(module: str) -> None:
    assert Resolver([LLAMA]).resolve(module) is None


def test_a_whole_name_comes_before_one_that_differs_by_wrappers() -> None:
    assert Resolver(["h.0.mlp", "model.h.0.mlp"]).resolve("model.h.0.mlp") == Resolved("model.h.0.mlp", False)


def test_a_name_that_two_modules_may_have_is_refused_with_both() -> None:
    with pytest.raises(RefusedError, match=r"may be h\.0\.mlp or model\.h\.0\.mlp"):
        Resolver(["h.0.mlp", "model.h.0.mlp"]).resolve("backbone.h.0.mlp")


def test_resolves_names_of_tied_weights() -> None:
    aliases = {"lm_head": "model.embed_tokens"}
    assert Resolver(["model.embed_tokens"], aliases).resolve("lm_head") == Resolved("model.embed_tokens", True)
    assert Resolver(["model.embed_tokens"], aliases).resolve("model.lm_head") == Resolved("model.embed_tokens", True)
    assert Resolver(["model.embed_tokens", "lm_head"], aliases).resolve("lm_head") == Resolved("lm_head", False)
    head = "language_model.lm_head"  # a weight of its own, whatever a subspace file's aliases say
    assert Resolver(["model.embed_tokens", head], aliases).resolve("lm_head") == Resolved(head, False)
    assert Resolver(["model.embed_tokens"], aliases).resolve("lm_heads") is None


@pytest.mark.parametrize(("tower", "wrapper"), list(product(TOWERS, LANGUAGE_WRAPPERS)))
@given(layer=st.integers(0, 99), part=st.sampled_from(["self_attn.q_proj", "mlp.fc1", "attn.qkv"]))
def test_a_tower_never_matches_the_language_model(tower: str, wrapper: str, layer: int, part: str) -> None:
    language = f"{wrapper}layers.{layer}.{part}"
    for outer in LANGUAGE_WRAPPERS:
        assert Resolver([language]).resolve(f"{outer}{tower}.layers.{layer}.{part}") is None
        assert Resolver([f"{outer}{tower}.layers.{layer}.{part}"]).resolve(language) is None
