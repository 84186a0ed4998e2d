"""Adapters of experts through the PEFT hook: whatever layout they come in, the model gets what `correct` returns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter

import csulora
import factories
from csulora.hooks import peft as hook
from expert_families import EXPERT_FAMILIES
from model_families import built, logits, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.usefixtures("one_thread"),
]

POLICY = csulora.Policy.project()


@dataclass
class Place:
    """A model and its subspace file."""

    root: Path
    family: Any
    subspace: csulora.Subspace

    def model(self) -> Any:
        return getattr(transformers, self.family.model).from_pretrained(self.root / "aligned").eval()

    def fused(self, path: Path, parameters: list[str], rank: int = 4, seed: int = 100) -> Path:
        """Write an adapter as PEFT does."""
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters
        )
        adapted = PeftModel(self.model(), config)
        train(adapted, seed=seed)
        adapted.save_pretrained(str(path), save_embedding_layers=False)
        return path

    def one_by_one(self, path: Path, without: str = "nothing") -> Path:
        """Write the same as transformers 4 did, without some projections."""
        fused = csulora.load_adapter(self.fused(path.with_name("fused"), self.family.parameters))
        found, _ = csulora.correct(fused, self.subspace, csulora.Policy.none(), "per-expert")
        modules = {name: module for name, module in found.modules.items() if not name.endswith(without)}
        csulora.save_adapter(replace(found, modules=modules, partial=True), path)
        return path

    def expected(self, adapter: Path) -> torch.Tensor:
        """What PEFT computes with the corrected adapter in its own layout."""
        fixed, _ = csulora.correct(csulora.load_adapter(adapter), self.subspace, POLICY, "fused")
        output = adapter.with_name(f"{adapter.name}-expected")
        csulora.save_adapter(fixed, output)
        return logits(PeftModel.from_pretrained(self.model(), str(output)))


@pytest.fixture(scope="module", params=["Qwen 3 MoE", "Mixtral", "gpt-oss"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    family, root = EXPERT_FAMILIES[request.param], tmp_path_factory.mktemp("family")
    model = built(family)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    return Place(root, family, csulora.extract(root / "base", root / "aligned", rank=4, expert_rank=4))


def by_load(place: Place, adapter: Path) -> Any:
    return hook.load(place.model(), adapter, place.subspace, POLICY)[0]


def by_from_pretrained(place: Place, adapter: Path) -> Any:
    with hook.guard(place.subspace, POLICY):
        return PeftModel.from_pretrained(place.model(), str(adapter))


def by_transformers(place: Place, adapter: Path) -> Any:
    model = place.model()
    with hook.guard(place.subspace, POLICY):
        model.load_adapter(str(adapter))
    return model


ROUTES = [by_load, by_from_pretrained, by_transformers]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["both", "gate and up", "down", "one by one", "no up projections"])
def test_route_is_corrected(kind: str, route: Callable[[Place, Path], Any], place: Place, tmp_path: Path) -> None:
    adapter, parameters = tmp_path / "adapter", place.family.parameters
    if kind in ("one by one", "no up projections"):
        if not place.family.per_expert:
            pytest.skip("no such adapters of this model")
        place.one_by_one(adapter, ("up_proj", ".w3") if kind == "no up projections" else "nothing")
    else:
        place.fused(adapter, {"both": parameters, "gate and up": parameters[:1], "down": parameters[1:]}[kind])

    found, expected = logits(route(place, adapter)), place.expected(adapter)

    assert (found - expected).abs().max() < 1e-5
    assert (found - logits(place.model())).abs().max() > 1e-3


def test_conversion_by_peft_changes_nothing(place: Place, tmp_path: Path) -> None:
    if not place.family.per_expert:
        pytest.skip("no such adapters of this model")
    adapter = place.one_by_one(tmp_path / "adapter")
    PeftModel.from_pretrained(place.model(), str(adapter)).save_pretrained(str(tmp_path / "converted"))

    before, after = (logits(by_load(place, path)) for path in (adapter, tmp_path / "converted"))
    assert (before - after).abs().max() < 1e-5


def test_in_memory(place: Place, tmp_path: Path) -> None:
    adapter = place.fused(tmp_path / "adapter", place.family.parameters)
    model = PeftModel.from_pretrained(place.model(), str(adapter))
    hook.correct_model(model, "default", "safe", place.subspace, POLICY)
    model.set_adapter("safe")
    assert (logits(model) - place.expected(adapter)).abs().max() < 1e-5


def swapped(place: Place, loaded: Path, other: Path) -> torch.Tensor:
    """Load one adapter corrected and swap the other in."""
    with hook.guard(place.subspace, POLICY):
        model = PeftModel.from_pretrained(place.model(), str(loaded))
        hotswap_adapter(model, str(other), "default", torch_device="cpu")
    return logits(model)


def test_swap_of_the_same_kind_is_corrected(place: Place, tmp_path: Path) -> None:
    loaded = place.fused(tmp_path / "loaded", place.family.parameters)
    other = place.fused(tmp_path / "other", place.family.parameters, seed=500)
    assert (swapped(place, loaded, other) - place.expected(other)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["lower rank", "gate and up", "one by one"])
def test_swap_that_peft_would_scramble_is_refused(kind: str, place: Place, tmp_path: Path) -> None:
    parameters = place.family.parameters
    loaded = place.fused(tmp_path / "loaded", parameters)
    if kind == "one by one":
        if not place.family.per_expert:
            pytest.skip("no such adapters of this model")
        other = place.one_by_one(tmp_path / "other")
    elif kind == "lower rank":
        other = place.fused(tmp_path / "other", parameters, rank=2)
    else:
        other = place.fused(tmp_path / "other", parameters[:1])
    with pytest.raises(csulora.RefusedError, match="PEFT scrambles factors of experts"):
        swapped(place, loaded, other)
