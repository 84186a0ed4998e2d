"""Adapters that PEFT and transformers add up: each within the limit, and their sum beyond it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftMixedModel, PeftModel, functional

import csulora
import factories
from csulora.correction.together import Undone
from csulora.errors import UncoveredRouteError, UndoTogetherError
from csulora.hooks import peft as hook
from zoo import llama_of_pairs as llama

# The hosts' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

NAME = "model.layers.0.self_attn.q_proj"
MODULES = {NAME: (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a subspace file, and an adapter under two names, twice of which is beyond the limit."""
    directory = tmp_path_factory.mktemp("place")
    subspace = csulora.extract(*factories.model_pair(directory), rank=4, output=directory / "subspace")
    path = factories.opposing_adapter(directory / "a", subspace, MODULES, 0.3)
    factories.opposing_adapter(directory / "b", subspace, MODULES, 0.3)
    found = Undone.by(csulora.load_adapter(path), subspace)
    assert found.shares == pytest.approx(dict.fromkeys(MODULES, 0.3), rel=1e-3)
    return directory


@pytest.fixture
def guarded(place: Path, tmp_path: Path) -> Iterator[Path]:
    """Under a guard that lets 0.5 of a module's alignment be undone; the log of its decisions."""
    log = tmp_path / "decisions.jsonl"
    with hook.guard(place / "subspace", csulora.Policy.none(max_undo=0.5), log):
        yield log


@pytest.fixture
def both(place: Path, guarded: Path) -> Any:
    """A model with both adapters, of which the first is active."""
    model = PeftModel.from_pretrained(llama(), place / "a", "a")
    model.load_adapter(str(place / "b"), "b")
    return model


def test_both_together_are_not_activated(both: Any, guarded: Path) -> None:
    with pytest.raises(UndoTogetherError, match=r"a \+ b: undo 0\.600 of the alignment of .* \(a 0\.300, b 0\.300\)"):
        both.base_model.set_adapter(["a", "b"])

    assert both.active_adapters == ["a"]
    last = json.loads(guarded.read_text().splitlines()[-1])
    assert (last["verdict"], last["name"], last["reason_code"]) == ("refused", "a + b", "undo-together")
    both.base_model.set_adapter(["a"])
    both.set_adapter("b")


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_a_weighted_adapter_beyond_the_limit_is_deleted(combination: str, both: Any) -> None:
    with pytest.raises(UndoTogetherError):
        both.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type=combination, svd_rank=8)
    assert "sum" not in both.peft_config

    both.add_weighted_adapter(["a", "b"], [0.2, 0.2], "sum", combination_type=combination, svd_rank=8)
    both.set_adapter("sum")


def test_one_adapter_beyond_the_limit_by_its_weight_is_deleted(both: Any) -> None:
    with pytest.raises(UndoTogetherError):
        both.add_weighted_adapter(["a"], [2.0], "twice", combination_type="cat")
    assert "twice" not in both.peft_config


def test_both_together_are_not_merged(both: Any) -> None:
    with pytest.raises(UndoTogetherError):
        both.merge_and_unload(adapter_names=["a", "b"])
    both.merge_adapter(["a"])
    with pytest.raises(UndoTogetherError):
        both.merge_adapter(["b"])
    both.unmerge_adapter()
    both.merge_and_unload(adapter_names=["b"])


def test_both_together_are_not_activated_in_a_mixed_model(place: Path, guarded: Path) -> None:
    model = PeftMixedModel.from_pretrained(llama(), str(place / "a"), "a")
    model.load_adapter(str(place / "b"), "b")

    with pytest.raises(UndoTogetherError):
        model.set_adapter(["a", "b"])


def test_transformers_does_not_activate_both_together(place: Path, guarded: Path) -> None:
    model = llama()
    model.load_adapter(str(place / "a"), "a")
    model.load_adapter(str(place / "b"), "b")

    with pytest.raises(UndoTogetherError):
        model.set_adapter(["a", "b"])
    model.set_adapter("b")


def test_what_is_not_measured_is_refused(both: Any) -> None:
    with pytest.raises(UncoveredRouteError, match=r"a \+ b: under a guard with a limit on undo"):
        functional.set_adapter(both.base_model.model, ["a", "b"])
    functional.set_adapter(both.base_model.model, "b")


def test_without_a_limit_nothing_is_measured(place: Path) -> None:
    with hook.guard(place / "subspace", "csulora"):
        model = PeftModel.from_pretrained(llama(), place / "a", "a")
        model.load_adapter(str(place / "b"), "b")
        model.base_model.set_adapter(["a", "b"])
        assert model.active_adapters == ["a", "b"]
