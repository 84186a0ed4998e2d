"""Adapters of experts, made by PEFT on tiny models of each family, mean the same after a correction."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import csulora
import factories
from csulora.models.resolver import Resolver
from expert_families import EXPERT_FAMILIES, ExpertFamily
from model_families import built, logits, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

NOTHING_LEFT = csulora.Policy(aligned=float("inf"), partial=float("inf"), off=float("inf"))
F32, BF16 = torch.float32, torch.bfloat16
KINDS = {
    "all-linear": F32,
    "the usual names": BF16,
    "rsLoRA": F32,
    "both parameters": BF16,
    "gate and up": F32,
    "down": F32,
}
# Which parameter a pair of factors is for does not depend on the family beyond these.
ONE_PARAMETER = {"Qwen 3 MoE", "gpt-oss", "Llama 4 text", "Nemotron-H"}


@pytest.fixture(scope="module", params=EXPERT_FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family = EXPERT_FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    model = built(family)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    csulora.extract(root / "base", root / "aligned", rank=8, expert_rank=8, output=root / "subspace")
    return request.param, root


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
        lora_alpha=8,
        target_modules=names,
        target_parameters=parameters.get(kind),
        use_rslora=kind == "rsLoRA",
    )


def make_adapter(model: Any, config: LoraConfig, path: Path, dtype: torch.dtype) -> None:
    adapted = get_peft_model(deepcopy(model), config)
    train(adapted, dtype=dtype)
    adapted.save_pretrained(str(path), save_embedding_layers=False)


def adapted_by(model: Any, path: Path) -> Any:
    return PeftModel.from_pretrained(deepcopy(model), str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_corrected(kind: str, place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    family = EXPERT_FAMILIES[name]
    if kind == "all-linear" and not family.all_linear:
        pytest.skip("PEFT cannot run this model with its router adapted")
    if kind in ("both parameters", "gate and up", "down") and name not in ONE_PARAMETER:
        pytest.skip("shown by another family")
    model = getattr(transformers, family.model).from_pretrained(root / "aligned").eval()
    make_adapter(model, config_of(family, kind), tmp_path / "adapter", KINDS[kind])
    raw, plain = logits(adapted_by(model, tmp_path / "adapter")), logits(model)
    assert (raw - plain).abs().max() > 1e-3

    loaded, subspace = csulora.load_adapter(tmp_path / "adapter"), csulora.Subspace.open(root / "subspace")
    # The scales are powers of two, so that folding one into a factor rounds nothing.
    outcomes = ((csulora.Policy.none(), raw, 1e-6), (NOTHING_LEFT, plain, 1e-4))
    layouts = (None, "fused", "per-expert") if family.per_expert and kind != "all-linear" else (None, "fused")
    for layout, (policy, expected, within) in itertools.product(layouts, outcomes):
        fixed, report = csulora.correct(loaded, subspace, policy, layout)
        assert {module.status for module in report.modules} == {"corrected"}
        csulora.save_adapter(fixed, tmp_path / "out")
        found = logits(adapted_by(model, tmp_path / "out"))
        assert (found - expected).abs().max() < within * max(1.0, float(expected.abs().max()))


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each parameter of experts, by the parameter's name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            owner = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{owner}.{module.parameter_name}"] = module.get_delta_weight("default").detach().double()
    return found


def projections(family: str, name: str, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """Take PEFT's dense update of a parameter apart, (out, in) each; written from transformers' code, not csulora's."""
    owner, _, parameter = name.rpartition(".")
    found = {}
    for expert, stored in enumerate(delta):
        matrix = stored.t() if family in ("gpt-oss", "Llama 4 text") else stored
        if parameter != "gate_up_proj":
            found[f"{owner}.{expert}.{parameter}"] = matrix
        elif family == "gpt-oss":
            found[f"{owner}.{expert}.gate_proj"], found[f"{owner}.{expert}.up_proj"] = matrix[::2], matrix[1::2]
        else:
            found[f"{owner}.{expert}.gate_proj"], found[f"{owner}.{expert}.up_proj"] = matrix.chunk(2)
    return found


def test_a_projection_of_each_expert_is_the_dense_one(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    family = EXPERT_FAMILIES[name]
    model = getattr(transformers, family.model).from_pretrained(root / "aligned").eval()
    make_adapter(model, config_of(family, "both parameters"), tmp_path / "adapter", F32)
    csulora.extract(root / "base", root / "aligned", rank=3, expert_rank=3, output=tmp_path / "subspace")
    subspace = csulora.Subspace.open(tmp_path / "subspace")
    fixed, _ = csulora.correct(csulora.load_adapter(tmp_path / "adapter"), subspace, csulora.Policy.load("project"))
    csulora.save_adapter(fixed, tmp_path / "out")

    before, after = (deltas(adapted_by(model, tmp_path / which)) for which in ("adapter", "out"))
    assert before.keys() == after.keys()
    resolver = Resolver(subspace)
    count = 0
    for parameter in before:
        theirs = projections(name, parameter, after[parameter])
        for module, update in projections(name, parameter, before[parameter]).items():
            stored = subspace[resolver.name_of(module)]
            u, v = stored.u.double(), stored.v.double()
            expected = u @ (u.t() @ update @ v) @ v.t()
            assert (theirs[module] - expected).norm() < 1e-5 * update.norm()
            count += 1
    assert count >= 8
