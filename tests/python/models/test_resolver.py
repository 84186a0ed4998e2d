import re
from functools import cache
from itertools import product

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from csulora.errors import RefusedError
from csulora.models.resolver import Resolved, Resolver
from wrapper_families import WRAPPER_FAMILIES

LLAMA = "model.layers.0.self_attn.q_proj"
LANGUAGE_WRAPPERS = ["", "model.", "language_model.", "language_model.model.", "model.language_model.", "backbone."]
LANGUAGE = re.compile(r"(^|\.)(language_model|text_model)\.")
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


def test_a_name_in_memory_is_one_of_the_same_weight() -> None:
    router, name = "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"
    resolver = Resolver([router], names={name: router})
    for spelled in (router, name, "layers.0.mlp.gate", "model.language_model.layers.0.mlp.gate"):
        assert resolver.resolve(spelled) == Resolved(router, False)
    assert Resolver([router, name], names={name: router}).resolve(name) == Resolved(name, False)


def test_resolves_names_of_tied_weights() -> None:
    aliases = {"lm_head": "model.embed_tokens"}
    assert Resolver(["model.embed_tokens"], aliases).resolve("lm_head") == Resolved("model.embed_tokens", True)
    assert Resolver(["model.embed_tokens"], aliases).resolve("model.lm_head") == Resolved("model.embed_tokens", True)
    assert Resolver(["model.embed_tokens", "lm_head"], aliases).resolve("lm_head") == Resolved("lm_head", False)
    head = "language_model.lm_head"  # a weight of its own, whatever a subspace file's aliases say
    assert Resolver(["model.embed_tokens", head], aliases).resolve("lm_head") == Resolved(head, False)
    assert Resolver(["model.embed_tokens"], aliases).resolve("lm_heads") is None


@cache
def modules_in_memory(name: str) -> tuple[list[str], list[str]]:
    """The linear modules of a wrapper's language model, and those of all else."""
    with torch.device("meta"):
        model = getattr(transformers, WRAPPER_FAMILIES[name].model)(WRAPPER_FAMILIES[name].config())
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    language = [name for name in linear if LANGUAGE.search(name)]
    return language, [name for name in linear if name not in language and name != "lm_head"]


@given(
    name=st.sampled_from(sorted(WRAPPER_FAMILIES)),
    before=st.lists(st.sampled_from(["model", "language_model", "backbone", "transformer", "base_model"]), max_size=3),
    choice=st.data(),
)
def test_no_wrapper_makes_a_tower_of_a_real_model_its_language_model(
    name: str, before: list[str], choice: st.DataObject
) -> None:
    language, others = modules_in_memory(name)
    module = choice.draw(st.sampled_from(others))
    spelled = ".".join([*before, module])
    assert Resolver(language).resolve(spelled) is None
    assert Resolver([spelled]).resolve(choice.draw(st.sampled_from(language))) is None
    found = Resolver([*language, *others]).resolve(spelled)
    assert found is None or found.module == module


@pytest.mark.parametrize(("tower", "wrapper"), list(product(TOWERS, LANGUAGE_WRAPPERS)))
@given(layer=st.integers(0, 99), part=st.sampled_from(["self_attn.q_proj", "mlp.fc1", "attn.qkv"]))
def test_a_tower_never_matches_the_language_model(tower: str, wrapper: str, layer: int, part: str) -> None:
    language = f"{wrapper}layers.{layer}.{part}"
    for outer in LANGUAGE_WRAPPERS:
        assert Resolver([language]).resolve(f"{outer}{tower}.layers.{layer}.{part}") is None
        assert Resolver([f"{outer}{tower}.layers.{layer}.{part}"]).resolve(language) is None
