"""PEFT drops factors whose names it does not find; the hook says so, and leaves no adapter active."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

import csulora
import factories
from csulora.hooks import peft as hook
from csulora.models.checkpoint import Checkpoint
from expert_families import EXPERT_FAMILIES
from model_families import FAMILIES, extracted, logits, opened

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]

LANGUAGE = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
POLICY = csulora.Policy.csulora(1.0)


def test_an_adapter_under_old_names_arrives(tmp_path: Path) -> None:
    family = FAMILIES["Qwen 2.5 VL"]
    modules, subspace = extracted(family, tmp_path, *LANGUAGE)
    adapter = factories.save_adapter(tmp_path / "adapter", modules)
    model = opened(family, tmp_path / "aligned")
    plain = logits(model)
    loaded, report = hook.load(model, adapter, subspace, POLICY)
    assert len(report.host_notes) == 1
    assert (logits(loaded) - plain).abs().max() > 1e-3
    assert len(get_peft_model_state_dict(loaded)) == 2 * len(modules)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 3 MoE"])
def test_experts_that_peft_converts_arrive(name: str, tmp_path: Path) -> None:
    family = EXPERT_FAMILIES[name]
    modules, subspace = extracted(family, tmp_path, *LANGUAGE)
    adapter = factories.save_adapter(tmp_path / "adapter", modules)
    _, report = hook.load(opened(family, tmp_path / "aligned"), adapter, subspace, POLICY)
    assert len(report.measured) == len(modules)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, csulora.Subspace]:
    """An adapter for the text-only class of a model that also sees."""
    root = tmp_path_factory.mktemp("text_only")
    modules, subspace = extracted(FAMILIES["Qwen 3.5"], root, *LANGUAGE)
    language = {name: shape for name, shape in modules.items() if "visual" not in name}
    renamed = {name.replace("model.language_model.", "model."): shape for name, shape in language.items()}
    factories.save_adapter(root / "adapter", renamed)
    return root, subspace


def test_an_adapter_for_the_text_only_class_is_loaded_into_that_alone(
    text_only: tuple[Path, csulora.Subspace],
) -> None:
    root, subspace = text_only
    family, adapter = FAMILIES["Qwen 3.5"], root / "adapter"
    hook.load(opened(family, root / "aligned", is_text_only=True), adapter, subspace, POLICY)
    model = opened(family, root / "aligned")
    plain = logits(model)

    refusal = r"\d+ of \d+ modules did not arrive in the model"
    with pytest.raises(csulora.RefusedError, match=refusal):
        hook.load(model, adapter, subspace, POLICY)
    assert torch.equal(logits(model), plain)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match=refusal):
        PeftModel.from_pretrained(model, str(adapter))
    assert torch.equal(logits(model), plain)


def test_an_adapter_beside_another_is_taken_out_again(text_only: tuple[Path, csulora.Subspace]) -> None:
    root, subspace = text_only
    whole = Checkpoint.open(root / "aligned").weights
    modules = {name: weight.shape for name, weight in whole.items() if re.search(r"language_model.*o_proj", name)}
    fits = factories.save_adapter(root / "fits", modules)
    host, _ = hook.load(opened(FAMILIES["Qwen 3.5"], root / "aligned"), fits, subspace, POLICY)
    before = logits(host)

    with pytest.raises(csulora.RefusedError, match="did not arrive"):
        hook.load(host, root / "adapter", subspace, POLICY, adapter_name="other")
    assert list(host.peft_config) == ["default"]
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="did not arrive"):
        host.load_adapter(str(root / "adapter"), "other")
    assert list(host.peft_config) == ["default"]
    assert torch.equal(logits(host), before)


def test_transformers_own_loader_is_checked_too(text_only: tuple[Path, csulora.Subspace]) -> None:
    root, subspace = text_only
    model = opened(FAMILIES["Qwen 3.5"], root / "aligned")
    plain = logits(model)
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="did not arrive"):
        model.load_adapter(str(root / "adapter"))
    assert torch.equal(logits(model), plain)
