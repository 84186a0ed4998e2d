"""Adapters of experts, made by PEFT on tiny models of each family, mean the same after a correction."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import csulora
import factories
from expert_families import FAMILIES, TOKENS, ExpertFamily

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore"),
]

NOTHING_LEFT = csulora.Policy(aligned=float("inf"), partial=float("inf"), off=float("inf"))
KINDS = ["all-linear", "the usual names", "both parameters", "gate and up", "down", "rsLoRA"]


def built(family: ExpertFamily) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.config()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * factories.gaussian(*parameter.shape, seed=i))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertFamily, Path]:
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    model = built(family)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    csulora.extract(root / "base", root / "aligned", rank=8, output=root / "subspace")
    return family, root


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits
    return found


def config_of(family: ExpertFamily, kind: str) -> LoraConfig:
    parameters = {
        "both parameters": family.parameters,
        "gate and up": family.parameters[:1],
        "down": family.parameters[1:],
        "rsLoRA": family.parameters,
    }
    names = {"all-linear": "all-linear", "the usual names": list(family.targets)}.get(kind, ["q_proj", "o_proj"])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=names,
        target_parameters=parameters.get(kind),
        use_rslora=kind == "rsLoRA",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_corrected(kind: str, place: tuple[ExpertFamily, Path], tmp_path: Path) -> None:
    family, root = place
    if kind == "all-linear" and not family.all_linear:
        pytest.skip("PEFT cannot run this model with its router adapted")
    model = getattr(transformers, family.model).from_pretrained(root / "aligned").eval()
    adapted = get_peft_model(deepcopy(model), config_of(family, kind))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * factories.gaussian(*parameter.shape, seed=100 + i))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    raw, plain = logits(PeftModel.from_pretrained(deepcopy(model), str(tmp_path / "adapter"))), logits(model)
    assert (raw - plain).abs().max() > 1e-3

    loaded, subspace = csulora.load_adapter(tmp_path / "adapter"), csulora.Subspace.open(root / "subspace")
    outcomes = ((csulora.Policy.none(), raw, 1e-5), (NOTHING_LEFT, plain, 1e-4))
    layouts = (None, "per-expert") if family.per_expert else (None,)
    for layout, (policy, expected, within) in itertools.product(layouts, outcomes):
        fixed, report = csulora.correct(loaded, subspace, policy, layout)
        assert {module.status for module in report.modules} == {"corrected"}
        csulora.save_adapter(fixed, tmp_path / "out")
        found = logits(PeftModel.from_pretrained(deepcopy(model), str(tmp_path / "out")))
        assert (found - expected).abs().max() < within
