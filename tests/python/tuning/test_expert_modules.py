"""Updates of single experts in a model that stacks them: added as PEFT adds them, and taken out again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import csulora
import tiny_model
from csulora.adapters.experts import decoded
from csulora.errors import InputError
from csulora.models.checkpoint import Checkpoint
from csulora.tuning import probes
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.request import Request
from csulora.tuning.tune import tune
from csulora.tuning.update import factors_of
from expert_families import EXPERT_FAMILIES
from model_families import built, logits, save_expert_pair, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def make_adapter(model: Any, parameters: list[str], path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=[], target_parameters=parameters)
    adapted = get_peft_model(model, config)
    train(adapted, scale=0.2, seed=0)
    adapted.save_pretrained(str(path))


@pytest.mark.parametrize("name", ["Qwen 3 MoE", "gpt-oss", "Llama 4 text", "Nemotron-H"])
def test_an_update_acts_as_in_peft(name: str, tmp_path: Path) -> None:
    family = EXPERT_FAMILIES[name]
    model = built(family)
    model.save_pretrained(tmp_path / "model")
    make_adapter(built(family), family.parameters, tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(built(family), str(tmp_path / "adapter")))
    plain = logits(model)

    language_model = LanguageModel(model, tiny_model.tokenizer(), longest_reply=2)
    layout = Checkpoint.open(tmp_path / "model").expert_layout
    adapter = decoded(csulora.load_adapter(tmp_path / "adapter"), layout)
    factors = {module: (b.requires_grad_(), a) for module, (b, a) in factors_of(adapter).items()}
    before = [parameter for parameter, _ in model.named_parameters()]
    with language_model.adapted(factors):
        found = model(input_ids=torch.tensor([[1, 9, 17]])).logits
        found.square().sum().backward()
        assert (logits(model) - expected).abs().max() < 1e-5
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(logits(model), plain)
    assert [parameter for parameter, _ in model.named_parameters()] == before
    # Experts that no token reaches have no gradient.
    assert max(float(b.grad.abs().max()) for b, _ in factors.values() if b.grad is not None) > 0


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("mlp.experts.9.down_proj", (32, 24), "has 4 experts in the model, and the adapter updates number 9"),
        ("mlp.experts.1.down_proj", (24, 32), r"is \[32, 24\] in the model"),
        ("mlp.experts.1.w7", (24, 32), "has no w7 in the model"),
    ],
)
def test_what_the_model_does_not_have_is_told(module: str, shape: tuple[int, int], message: str) -> None:
    language_model = LanguageModel(built(EXPERT_FAMILIES["Qwen 3 MoE"]), tiny_model.tokenizer(), longest_reply=2)
    factors = {f"model.layers.0.{module}": (torch.ones(shape[0], 1), torch.ones(1, shape[1]))}
    with pytest.raises(InputError, match=message), language_model.adapted(factors):
        pass


def test_a_policy_is_fitted_to_experts(tmp_path: Path) -> None:
    family = EXPERT_FAMILIES["Qwen 3 MoE"]
    model = built(family)
    save_expert_pair(model, tmp_path)
    make_adapter(model, family.parameters, tmp_path / "adapter")
    csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=2, modules=["*.experts.*"], output=tmp_path / "file")
    request = Request(
        model=str(tmp_path / "aligned"),
        adapters=[csulora.load_adapter(tmp_path / "adapter")],
        subspace=csulora.Subspace.open(tmp_path / "file"),
        task=[probes.parse(tiny_model.prompts("w1", 12).encode())],
        safety=probes.parse(tiny_model.prompts("w2", 12).encode()),
        loading=Loading("cpu"),
        longest_reply=2,
        options=Options(steps=2),
        task_weights=(1.0,),
    )
    frontier = tune(request, tmp_path / "policy.toml")
    adapter = csulora.load_adapter(tmp_path / "adapter")
    fixed, report = csulora.correct(adapter, request.subspace, csulora.Policy.load(tmp_path / "policy.toml"))
    point = next(point for point in frontier.points if point.policy == frontier.written)
    assert report.totals.relative_change == pytest.approx(point.relative_change)
    assert set(fixed.modules) == set(adapter.modules)
