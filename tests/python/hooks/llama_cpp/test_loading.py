"""The hook with the real library: what llama.cpp computes is what PEFT computes with the corrected adapter."""

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import csulora
import factories
import gguf_zoo
from csulora.errors import InputError, RefusedError
from csulora.policy.policy import Policy

pytestmark = [pytest.mark.llama_cpp, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
pytest.importorskip("llama_cpp")

from csulora.hooks import llama_cpp as hook  # noqa: E402 - needs the library

TOLERANCE = 1e-3
EXACT = {"n_ctx": 256, "logits_all": True, "n_threads": 1, "verbose": False, "type_k": 0, "type_v": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model in both formats, its subspace file, and two adapters, one of them in both formats."""
    directory = tmp_path_factory.mktemp("world")
    gguf_zoo.save_gguf("llama", directory / "model.gguf")
    gguf_zoo.save_model("llama", directory / "model")
    state = gguf_zoo.model("llama").state_dict()
    base = factories.save_checkpoint(directory / "base", factories.moved(state), {"model_type": "llama"})
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    aligned = factories.save_checkpoint(directory / "aligned", state, settings)
    csulora.extract(base, aligned, rank=4, output=directory / "subspace")
    gguf_zoo.make_adapter("llama", directory / "one", use_rslora=True)
    gguf_zoo.make_adapter("llama", directory / "two", target_modules=["v_proj", "o_proj"], r=3)
    raw = csulora.load_adapter(directory / "one")
    csulora.save_adapter(raw, directory / "one.gguf", "gguf", base_model=directory / "model.gguf")
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "csulora" / "gguf"


def reference(world: Path, scales: dict[str, float], policy: Policy, tmp_path: Path) -> np.ndarray:
    """Logits of plain PEFT with corrected adapters, each update multiplied by its scale."""
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager")
    for name, scale in scales.items():
        subspace = csulora.Subspace.open(world / "subspace")
        fixed, _ = csulora.correct(csulora.load_adapter(world / name), subspace, policy)
        csulora.save_adapter(fixed, tmp_path / name)
        merged = PeftModel.from_pretrained(model, tmp_path / name)
        for module in merged.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {adapter: scale * value for adapter, value in module.scaling.items()}
        model = merged.merge_and_unload()
    return gguf_zoo.logits(model.eval())


@pytest.mark.parametrize("adapter", ["one", "one.gguf"])
@pytest.mark.parametrize(
    "policy", [Policy.csulora(3.0), Policy.project(), Policy.protect(5.0)], ids=["csulora", "project", "protect"]
)
def test_corrects_on_load(adapter: str, policy: Policy, world: Path, tmp_path: Path) -> None:
    with closing(hook.load(world / "model.gguf", world / adapter, world / "subspace", policy, **EXACT)) as llama:
        found = gguf_zoo.evaluate(llama)
    raw = gguf_zoo.llama_logits(world / "model.gguf", world / "one.gguf")
    assert np.abs(found - reference(world, {"one": 1.0}, policy, tmp_path)).max() <= TOLERANCE
    assert np.abs(found - raw).max() > 100 * TOLERANCE


def test_several_adapters_with_scales(world: Path, tmp_path: Path) -> None:
    scales = {"one": 0.5, "two": -1.5}
    adapters = {world / name: scale for name, scale in scales.items()}
    policy = Policy.csulora(2.0)
    with closing(hook.load(world / "model.gguf", adapters, world / "subspace", policy, **EXACT)) as llama:
        found = gguf_zoo.evaluate(llama)
    assert np.abs(found - reference(world, scales, policy, tmp_path)).max() <= TOLERANCE


def test_a_second_load_is_a_hit(world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (world / "model.gguf", world / "one", csulora.Subspace.open(world / "subspace"), "csulora")
    with closing(hook.load(*arguments, **EXACT)) as llama:
        first = gguf_zoo.evaluate(llama)
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns

    def unexpected(*_: object) -> None:
        raise AssertionError("corrected again")

    monkeypatch.setattr("csulora.serving.open_decision.correct", unexpected)
    with closing(hook.load(*arguments, **EXACT)) as llama:
        assert np.array_equal(gguf_zoo.evaluate(llama), first)
    assert [entry.stat().st_mtime_ns for entry in cache.iterdir()] == [written]


def test_the_cache_may_lie_elsewhere(world: Path, cache: Path, tmp_path: Path) -> None:
    hook.load(
        world / "model.gguf", world / "two", world / "subspace", "csulora", cache=tmp_path / "mine", **EXACT
    ).close()
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert not cache.exists()


def test_every_load_is_in_the_log(world: Path, tmp_path: Path) -> None:
    adapters, log = {world / "one": 1.0, world / "two": 0.5}, tmp_path / "decisions.jsonl"
    for _ in range(2):
        hook.load(world / "model.gguf", adapters, world / "subspace", "csulora", decisions=log, **EXACT).close()
    strict = Policy.csulora(max_undo=-100.0)
    with pytest.raises(RefusedError, match="undoes"):
        hook.load(world / "model.gguf", world / "one", world / "subspace", strict, decisions=log, **EXACT)
    decisions = [json.loads(line) for line in log.read_text().splitlines()]
    names = [Path(decision["path"]).name for decision in decisions]
    assert names == ["one", "two", "one", "two", "one"]
    assert [decision["verdict"] for decision in decisions] == ["corrected"] * 4 + ["refused"]
    assert {decision["subspace_sha256"] for decision in decisions} == {csulora.Subspace.open(world / "subspace").sha256}


def test_refuses_as_everywhere(world: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="undoes"):
        hook.load(world / "model.gguf", world / "one", world / "subspace", Policy.csulora(max_undo=-100.0), **EXACT)
    gguf_zoo.make_adapter("llama", tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(RefusedError, match="does not cover module lm_head"):
        hook.load(world / "model.gguf", tmp_path / "head", world / "subspace", "csulora", **EXACT)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["lora_path", "lora_base", "lora_scale"])
def test_refuses_ways_around_it(name: str, world: Path) -> None:
    with pytest.raises(RefusedError, match=f"{name} would load an adapter that was not corrected"):
        hook.load(world / "model.gguf", world / "one", world / "subspace", "csulora", **{name: str(world / "one.gguf")})


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_refuses_copies_that_would_lose_the_adapter(duplicate: Callable, world: Path) -> None:
    llama = hook.load(world / "model.gguf", world / "one", world / "subspace", "csulora", **EXACT)
    with closing(llama), pytest.raises(RefusedError, match="copied without its adapters"):
        duplicate(llama)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_refuses_scales_that_are_not_finite(scale: float, world: Path) -> None:
    with pytest.raises(InputError, match="it must be finite"):
        hook.load(world / "model.gguf", {world / "one": scale}, world / "subspace", "csulora")


def test_refuses_no_adapter_at_all(world: Path) -> None:
    with pytest.raises(InputError, match="no adapter"):
        hook.load(world / "model.gguf", {}, world / "subspace", "csulora")


def test_what_llama_cpp_refuses_is_an_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_adapter_lora_init", lambda *_: None)
    with pytest.raises(InputError, match=r"llama\.cpp does not load it"):
        hook.load(world / "model.gguf", world / "one", world / "subspace", "csulora", **EXACT)


def test_half_precision_adapters(world: Path, tmp_path: Path) -> None:
    """They stay what they are; llama.cpp rounds what it multiplies them with, too."""
    gguf_zoo.make_adapter("llama", tmp_path / "half", dtype=torch.bfloat16)
    with closing(hook.load(world / "model.gguf", tmp_path / "half", world / "subspace", "csulora", **EXACT)) as llama:
        found = gguf_zoo.evaluate(llama)
    subspace = csulora.Subspace.open(world / "subspace")
    fixed, _ = csulora.correct(csulora.load_adapter(tmp_path / "half"), subspace, csulora.Policy.csulora())
    csulora.save_adapter(fixed, tmp_path / "fixed")
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager")
    expected = gguf_zoo.logits(PeftModel.from_pretrained(model, tmp_path / "fixed"))
    assert np.abs(found - expected).max() <= 20 * TOLERANCE


def test_the_sum_of_adapters_obeys_the_limit_that_each_does(world: Path, tmp_path: Path) -> None:
    subspace, policy = csulora.Subspace.open(world / "subspace"), csulora.Policy.none(max_undo=0.5)
    modules = {name: module.shape for name, module in csulora.load_adapter(world / "one").modules.items()}
    covered = {name: shape for name, shape in modules.items() if name in subspace}
    a, b = (factories.opposing_adapter(tmp_path / name, subspace, covered, 0.3) for name in "ab")
    log = tmp_path / "decisions.jsonl"
    options = {"cache": tmp_path / "cache", "decisions": log, **EXACT}

    for adapters in ({a: 1.0, b: 1.0}, {a: 2.0}):
        with pytest.raises(RefusedError, match=r"undo 0\.600 of the alignment"):
            hook.load(world / "model.gguf", adapters, world / "subspace", policy, **options)
    assert log.read_text().count('"refused"') == 2
    for adapters in ({a: 1.0, b: 0.5}, {a: 1.0}):
        hook.load(world / "model.gguf", adapters, world / "subspace", policy, **options).close()
