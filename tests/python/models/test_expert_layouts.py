"""Experts one by one, as in transformers 4, and fused, as in transformers 5: one update in either layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import csulora
import factories
from csulora.adapters.lora import Adapter
from csulora.errors import InputError, RefusedError
from expert_families import EXPERT_FAMILIES
from model_families import built, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

RANK, SCALE = 4, 2.0
FAMILIES = ("Qwen 3 MoE", "Mixtral", "LFM2 MoE")  # PEFT drops single experts of the last one
ROUTERS = {"Qwen 3 MoE": "mlp.gate", "Mixtral": "block_sparse_moe.gate"}


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, model_pair(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_pair("Qwen 3 MoE", tmp_path_factory.mktemp("family"))


def model_pair(name: str, root: Path) -> Path:
    """Write a tiny model before and after alignment, and its subspace file."""
    model = built(EXPERT_FAMILIES[name])
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() >= 2:
                parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    csulora.extract(root / "base", root / "aligned", rank=8, expert_rank=8, output=root / "subspace")
    return root


def per_expert_adapter(name: str, aligned: Path, path: Path, experts: range) -> Adapter:
    """Write an adapter of some experts, the attention and the router, under the names of the checkpoint."""
    kinds = ("q_proj", ROUTERS.get(name, "q_proj"))
    weights = load_file(aligned / "model.safetensors")
    chosen = [
        weight.removesuffix(".weight")
        for weight, tensor in weights.items()
        if tensor.dim() == 2
        and (weight.removesuffix(".weight").endswith(kinds) or any(f".experts.{e}." in weight for e in experts))
    ]
    tensors = {}
    for i, module in enumerate(chosen):
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * factories.gaussian(RANK, columns, seed=2 * i)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * factories.gaussian(rows, RANK, seed=2 * i + 1)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in chosen})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return csulora.load_adapter(path)


def merged(name: str, aligned: Path, adapter: Adapter) -> Any:
    """The aligned model with an update, of the checkpoint's names, added to its weights."""
    model = getattr(transformers, EXPERT_FAMILIES[name].model).from_pretrained(aligned).eval()
    with torch.no_grad():
        for module, update in adapter.modules.items():
            dense = update.scale * update.b.double() @ update.a.double()
            weight, part = parameter_of(model, module)
            weight[part] += dense.to(weight.dtype)
    return model


def parameter_of(model: Any, module: str) -> tuple[torch.Tensor, Any]:
    """A weight in memory and the part of it that a module of the checkpoint is."""
    module = module.replace("block_sparse_moe", "mlp")
    if ".experts." not in module:
        return model.get_parameter(f"{module}.weight"), ...
    owner, expert, projection = module.rsplit(".", 2)
    if projection in ("w2", "down_proj"):
        return model.get_parameter(f"{owner}.down_proj"), int(expert)
    both = model.get_parameter(f"{owner}.gate_up_proj")
    width = both.shape[1] // 2
    rows = slice(0, width) if projection in ("w1", "gate_proj") else slice(width, 2 * width)
    return both, (int(expert), rows)


@pytest.mark.parametrize("experts", [range(4), range(1, 3)])
def test_single_experts_are_fused_and_mean_the_same(place: tuple[str, Path], tmp_path: Path, experts: range) -> None:
    name, root = place
    adapter = per_expert_adapter(name, root / "aligned", tmp_path / "adapter", experts)
    subspace = csulora.Subspace.open(root / "subspace")
    fixed, _ = csulora.correct(adapter, subspace, csulora.Policy.none(), "fused")
    csulora.save_adapter(fixed, tmp_path / "fused")
    model = getattr(transformers, EXPERT_FAMILIES[name].model).from_pretrained(root / "aligned").eval()
    expected, plain = logits(merged(name, root / "aligned", adapter)), logits(model)
    assert (expected - plain).abs().max() > 1e-3
    found = logits(PeftModel.from_pretrained(model, str(tmp_path / "fused")))
    assert (found - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))


def test_single_experts_stay_so_and_peft_fuses_them(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    if name == "LFM2 MoE":
        pytest.skip("PEFT drops single experts of this model")
    adapter = per_expert_adapter(name, root / "aligned", tmp_path / "adapter", range(4))
    fixed, _ = csulora.correct(adapter, csulora.Subspace.open(root / "subspace"), csulora.Policy.none())
    csulora.save_adapter(fixed, tmp_path / "single")
    model = getattr(transformers, EXPERT_FAMILIES[name].model).from_pretrained(root / "aligned").eval()
    expected = logits(merged(name, root / "aligned", adapter))
    found = logits(PeftModel.from_pretrained(model, str(tmp_path / "single")))
    assert (found - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))


def test_fused_and_back_every_factor_has_the_same_bits(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    adapter = per_expert_adapter(name, root / "aligned", tmp_path / "adapter", range(4))
    subspace, policy = csulora.Subspace.open(root / "subspace"), csulora.Policy.none()
    csulora.save_adapter(csulora.correct(adapter, subspace, policy, "fused")[0], tmp_path / "fused")
    fused = csulora.load_adapter(tmp_path / "fused")
    assert set(fused.config["target_parameters"])
    csulora.save_adapter(csulora.correct(fused, subspace, policy, "per-expert")[0], tmp_path / "back")
    back = csulora.load_adapter(tmp_path / "back")
    experts = {module for module in adapter.modules if ".experts." in module}
    assert experts == {module for module in back.modules if ".experts." in module}
    for module in experts:
        assert torch.equal(back.modules[module].a, adapter.modules[module].a)
        assert torch.equal(back.modules[module].b, SCALE * adapter.modules[module].b)


def test_a_rank_that_is_asked_for_is_that_of_gate_and_up_together(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    adapter = per_expert_adapter(name, root / "aligned", tmp_path / "adapter", range(4))
    subspace = csulora.Subspace.open(root / "subspace")
    fixed, report = csulora.correct(adapter, subspace, csulora.Policy.none(rank=RANK), "fused")
    kept = {module.module: module for module in report.modules}
    gates = {key: update for key, update in fixed.modules.items() if key.endswith(".gate_up_proj")}
    assert gates
    for key, both in gates.items():
        assert both.rank == RANK
        names = [named(adapter, key, one, two) for one, two in (("gate_proj", "w1"), ("up_proj", "w3"))]
        dense = [
            update.scale * update.b.double() @ update.a.double() for update in (adapter.modules[name] for name in names)
        ]
        values = torch.linalg.svdvals(torch.cat(dense))
        best = values[RANK:].square().sum()
        found = (both.b.double() @ both.a.double() - torch.cat(dense)).square().sum()
        assert found == pytest.approx(float(best), rel=1e-4)
        stated = sum(
            kept[other].truncation_error * each.square().sum() for other, each in zip(names, dense, strict=True)
        )
        assert float(stated) == pytest.approx(float(best), rel=1e-3)


def named(adapter: Adapter, fused: str, *projections: str) -> str:
    """The module of an adapter of single experts that is a projection of a fused expert."""
    layer, expert = fused.split(".")[2], fused.split(".")[-2]
    ends = tuple(f".experts.{expert}.{projection}" for projection in projections)
    return next(name for name in adapter.modules if name.split(".")[2] == layer and name.endswith(ends))


def test_an_unknown_layout_is_refused(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    adapter = per_expert_adapter(name, root / "aligned", tmp_path / "adapter", range(4))
    with pytest.raises(InputError, match="layout is 'stacked'; it must be per-expert or fused"):
        csulora.correct(adapter, csulora.Subspace.open(root / "subspace"), csulora.Policy.none(), "stacked")


# The order of the columns of B in files that Unsloth wrote


def of_unsloth(root: Path, path: Path, fields: dict[str, Any]) -> tuple[Path, Adapter]:
    """An adapter of fused experts with the columns of B expert by expert, and the same as PEFT orders them."""
    adapter = per_expert_adapter("Qwen 3 MoE", root / "aligned", path / "single", range(4))
    fused = csulora.correct(adapter, csulora.Subspace.open(root / "subspace"), csulora.Policy.none(), "fused")[0]
    csulora.save_adapter(fused, path / "peft")
    csulora.save_adapter(fused, path / "unsloth")
    weights = load_file(path / "peft" / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if ".experts" in name and name.endswith("lora_B.weight"):
            weights[name] = tensor.view(len(tensor), -1, 4).transpose(1, 2).reshape(tensor.shape).contiguous()
    save_file(weights, path / "unsloth" / "adapter_model.safetensors")
    config = path / "unsloth" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return path / "unsloth", csulora.load_adapter(path / "peft")


OF_UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}


@pytest.mark.parametrize(
    ("fields", "told", "is_peft"),
    [
        (OF_UNSLOTH, "unsloth", False),
        (OF_UNSLOTH, "peft", True),
        (OF_UNSLOTH | {"lora_B_layout": "grouped_by_expert"}, None, False),
        (OF_UNSLOTH | {"lora_B_layout": "rank_major"}, None, True),
        ({"auto_mapping": {"unsloth_fixed": True, "lora_B_layout": "grouped_by_expert"}}, None, False),
        ({"lora_B_layout": "grouped_by_expert"}, "unsloth", False),
        ({"unsloth_fixed": False}, None, True),
        ({}, None, True),
    ],
)
def test_who_ordered_the_columns_decides(
    qwen: Path, tmp_path: Path, fields: dict[str, Any], told: str | None, is_peft: bool
) -> None:
    path, expected = of_unsloth(qwen, tmp_path, fields)
    found = csulora.load_adapter(path, expert_layout=told)
    assert found.modules.keys() == expected.modules.keys()
    same = all(torch.equal(found.modules[name].b, module.b) for name, module in expected.modules.items())
    assert same is not is_peft


@pytest.mark.parametrize(
    ("fields", "told", "error", "words"),
    [
        (OF_UNSLOTH, None, RefusedError, "nothing in the file says which order this is.*--expert-layout unsloth"),
        ({"unsloth_fixed": True}, None, RefusedError, "Unsloth trained these fused experts"),
        ({"lora_B_layout": "rank_major"}, "unsloth", InputError, "laid out as peft does; leave out unsloth"),
        (
            {"lora_B_layout": "other"},
            None,
            InputError,
            "lora_B_layout is 'other'; it must be null or one of rank_major",
        ),
        ({"auto_mapping": {"lora_B_layout": ["rank_major"]}}, None, InputError, "lora_B_layout is"),
        (
            {"lora_B_layout": "rank_major", "auto_mapping": {"lora_B_layout": "grouped_by_expert"}},
            None,
            InputError,
            "lora_B_layout is there twice",
        ),
        ({}, "other", InputError, "layout of experts is 'other'; it must be peft or unsloth"),
    ],
)
def test_an_order_that_nothing_says_is_refused(
    qwen: Path, tmp_path: Path, fields: dict[str, Any], told: str | None, error: type[Exception], words: str
) -> None:
    path, _ = of_unsloth(qwen, tmp_path, fields)
    with pytest.raises(error, match=words):
        csulora.load_adapter(path, expert_layout=told)


def test_an_adapter_of_unsloths_without_fused_experts_is_read(qwen: Path, tmp_path: Path) -> None:
    adapter = per_expert_adapter("Qwen 3 MoE", qwen / "aligned", tmp_path / "adapter", range(4))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | OF_UNSLOTH))
    assert csulora.load_adapter(tmp_path / "adapter").modules.keys() == adapter.modules.keys()
