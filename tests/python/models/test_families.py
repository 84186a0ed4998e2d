"""Names on disk, in memory and in adapters differ; what csulora makes of an adapter does not depend on that."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import csulora
import factories
from model_families import FAMILIES, TOKENS, Family

# PEFT 0.21 asks a module for an attribute that transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "all-linear": "all-linear",
    "the seven names": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# Everything that alignment moved is inside a subspace of full rank, on both sides.
NOTHING_LEFT = csulora.Policy(aligned=float("inf"), partial=float("inf"), off=float("inf"))


def built(family: Family) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.config()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * factories.gaussian(*parameter.shape, seed=i))
    return model


def move(model: Any, seed: int) -> None:
    """Change every matrix, as alignment does."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=seed + i))


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family's base and aligned checkpoints, and a subspace file of full rank."""
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    model = built(family)
    model.save_pretrained(root / "base")
    move(model, seed=1000)
    model.save_pretrained(root / "aligned")
    csulora.extract(root / "base", root / "aligned", rank=8, output=root / "subspace")
    return family, root


def opened(name: str, root: Path) -> Any:
    return getattr(transformers, name).from_pretrained(root / "aligned").eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits
    return found


def make_adapter(model: Any, targets: Any, path: Path) -> Any:
    adapted = get_peft_model(
        deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets)
    )
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * factories.gaussian(*parameter.shape, seed=100 + i))
    adapted.save_pretrained(str(path), save_embedding_layers=False)
    return adapted


def corrected(adapter: Path, root: Path, policy: csulora.Policy, out: Path) -> Path:
    loaded, subspace = csulora.load_adapter(adapter), csulora.Subspace.open(root / "subspace")
    fixed, report = csulora.correct(loaded, subspace, policy)
    assert len(report.measured) == len(loaded.modules)
    csulora.save_adapter(fixed, out)
    return out


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("is_text_only", [False, True])
def test_every_module_is_found_and_corrected(
    targets: str, is_text_only: bool, place: tuple[Family, Path], tmp_path: Path
) -> None:
    family, root = place
    if is_text_only and family.text_model is None:
        pytest.skip("this family has no text-only class of the same checkpoint")
    if targets == "the seven names" and family.model.startswith("Phi3"):
        pytest.skip("Phi 3 has none of these names but two")
    model = opened(family.text_model or family.model if is_text_only else family.model, root)
    adapted = make_adapter(model, TARGETS[targets], tmp_path / "adapter")
    raw, plain = logits(adapted), logits(model)
    assert (raw - plain).abs().max() > 1e-3

    kept = corrected(tmp_path / "adapter", root, csulora.Policy.none(), tmp_path / "kept")
    assert (logits(PeftModel.from_pretrained(deepcopy(model), str(kept))) - raw).abs().max() < 1e-5
    nothing = corrected(tmp_path / "adapter", root, NOTHING_LEFT, tmp_path / "nothing")
    assert (logits(PeftModel.from_pretrained(deepcopy(model), str(nothing))) - plain).abs().max() < 1e-4


def test_a_text_only_base_fits_an_aligned_model_with_a_tower(tmp_path: Path) -> None:
    family = FAMILIES["Qwen 3.5"]
    assert family.text_model is not None
    model = built(family)
    model.save_pretrained(tmp_path / "aligned")
    move(model, seed=2000)
    model.save_pretrained(tmp_path / "base")
    text = getattr(transformers, family.text_model).from_pretrained(tmp_path / "base")
    text.save_pretrained(tmp_path / "text")

    whole = csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=8)
    partial = csulora.extract(tmp_path / "text", tmp_path / "aligned", rank=8)

    language = {name for name in whole if "visual" not in name}
    assert set(partial) == language
    assert set(whole) > language
    for name in language:
        assert torch.equal(partial[name].u, whole[name].u)
        assert torch.equal(partial[name].v, whole[name].v)


def test_one_module_of_the_base_is_compared_with_one_of_the_aligned_model(tmp_path: Path) -> None:
    name = "layers.0.self_attn.q_proj.weight"
    wide = factories.gaussian(48, 48, seed=1)
    factories.save_checkpoint(tmp_path / "base", {f"model.{name}": wide})
    both = {f"model.language_model.{name}": wide + 1, f"backbone.{name}": wide + 2}
    factories.save_checkpoint(tmp_path / "aligned", both)
    with pytest.raises(csulora.InputError, match="is missing"):
        csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=2)
    factories.save_checkpoint(tmp_path / "exact", both | {f"model.{name}": wide + wide.t()})
    module = f"model.{name}".removesuffix(".weight")
    assert list(csulora.extract(tmp_path / "base", tmp_path / "exact", rank=2, modules=[module])) == [module]
