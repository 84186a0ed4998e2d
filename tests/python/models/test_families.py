"""Names on disk, in memory and in adapters differ; what csulora makes of an adapter does not depend on that.

`CSULORA_RECORD=1` writes what was reached to bench/results, from where the table of compatibility.md comes.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import csulora
import factories
import oracle
from csulora.models.resolver import Resolver
from language_families import Family
from model_families import FAMILIES, built, logits, move, opened
from tolerances import COMPUTED, STORED

pytestmark = [
    # PEFT 0.21 asks a module for an attribute that transformers renames.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),  # Llama 4's rotary embedding
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # GPT-2; PEFT sets it to True
    pytest.mark.usefixtures("one_thread"),
]

RECORD = Path(__file__).parents[3] / "bench" / "results" / "compatibility" / "families.json"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = [torch.float32, torch.bfloat16]
ROUTES = ["all-linear", "the seven names", "text-only"]
INFINITY = float("inf")
NOTHING = csulora.Policy(aligned=INFINITY, partial=INFINITY, off=INFINITY)

# Relative to the logits. In float32 the scale 1.5 is folded into B, which rounds; in bfloat16 it rounds as that does.
SAME_LOGITS = {torch.float32: 1e-6, torch.bfloat16: STORED[torch.bfloat16]}

_TOWER = re.compile(r"vision|visual|audio")
_LAYERS = re.compile(r"(.*?)\.\d+\.")

Record = dict[str, Any]


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """What was reached, by family and storage type."""
    reached: Record = {}
    yield reached
    if os.environ.get("CSULORA_RECORD") and reached.keys() == FAMILIES.keys():
        versions = {package.__name__: package.__version__ for package in (peft, transformers)}
        RECORD.write_text(json.dumps({"versions": versions, "families": reached}, indent=1) + "\n")


@pytest.fixture(scope="module", params=[(name, dtype) for name in FAMILIES for dtype in DTYPES], ids=str)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.dtype, Path]:
    """A family, a storage type, and where its base and aligned checkpoints and a subspace file lie."""
    name, dtype = request.param
    root = tmp_path_factory.mktemp("family")
    model = built(FAMILIES[name]).to(dtype)
    model.save_pretrained(root / "base")
    move(model, seed=1000)
    model.save_pretrained(root / "aligned")
    csulora.extract(root / "base", root / "aligned", rank=8, dtype="f32", output=root / "subspace")
    return name, dtype, root


def targets(family: Family, route: str) -> str | list[str]:
    if route == "the seven names":
        return SEVEN
    return family.linear if isinstance(family.linear, str) else list(family.linear)


def adapted(model: Any, family: Family, route: str, dtype: torch.dtype, path: Path) -> PeftModel:
    """Adapt a model with random factors of that storage type, and save them."""
    tower = None if route == "text-only" else family.tower
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets(family, route), exclude_modules=tower
    )
    found = get_peft_model(model, config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(found.named_parameters()):
            if "lora_" in name:
                parameter.copy_((0.1 * factories.gaussian(*parameter.shape, seed=100 + i)).to(dtype))
    found.save_pretrained(str(path), save_embedding_layers=False)
    weights = path / "adapter_model.safetensors"
    save_file({name: factor.to(dtype) for name, factor in load_file(weights).items()}, weights)
    return found


def with_adapter(model: PeftModel, path: Path) -> torch.Tensor:
    """Return the logits under one more adapter."""
    model.load_adapter(str(path), path.name)
    model.set_adapter(path.name)
    return logits(model)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def weight(model: Any, module: str) -> torch.Tensor:
    """A module's weight (out, in)."""
    layer = model.get_submodule(module)
    layer = getattr(layer, "base_layer", layer)
    stored = layer.weight.detach().double()
    return stored.t() if isinstance(layer, transformers.Conv1D) else stored


def check_subspaces(adapter: csulora.Adapter, subspace: csulora.Subspace, base: Any, aligned: Any) -> None:
    """Check that each module was found the directions of its own displacement."""
    resolver = Resolver(subspace, subspace.aliases)
    for name in adapter.modules:
        found = resolver.resolve(name)
        assert found is not None
        target = subspace[found.module]
        moved = weight(aligned, name) - weight(base, name)
        inside = target.u.double().t() @ moved @ target.v.double()
        assert relative(inside, target.s.double().diag()) < 1e-4, name


def projection_error(adapter: csulora.Adapter, fixed: csulora.Adapter, subspace: csulora.Subspace) -> float:
    """Return by how much a projection differs from the dense one in float64, at the worst module."""
    resolver, errors = Resolver(subspace, subspace.aliases), []
    for name, module in adapter.modules.items():
        target = subspace[resolver.resolve(name).module]  # type: ignore[union-attr]
        update, after = oracle.update(module.b, module.a, module.scale), fixed.modules[name]
        expected = oracle.closest_safe_update(update, target.u, target.v, (0.0, INFINITY, INFINITY))
        errors.append(relative(oracle.update(after.b, after.a), expected))
    return max(errors)


def layers(modules: Iterable[str]) -> str:
    """What comes before the number of a language model's layer."""
    found = {match[1] for name in modules if not _TOWER.search(name) and (match := _LAYERS.match(name))}
    assert len(found) == 1
    return found.pop()


def keep_worst(record: Record, dtype: torch.dtype, reached: Record) -> None:
    """Keep the largest of each figure."""
    figures = record.setdefault(str(dtype).removeprefix("torch."), {})
    figures |= {key: max(value, figures.get(key, value)) for key, value in reached.items()}


def has_other_linear_modules(model: Any) -> bool:
    """Whether ``all-linear`` means more than the seven names."""
    linear = (torch.nn.Linear, transformers.Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    return not names - {"lm_head"} <= set(SEVEN)


@pytest.mark.parametrize("route", ROUTES)
def test_every_module_is_found_and_corrected(
    route: str, place: tuple[str, torch.dtype, Path], record: Record, tmp_path: Path
) -> None:
    name, dtype, root = place
    family, is_text_only = FAMILIES[name], route == "text-only"
    if is_text_only and family.text_model is None:
        pytest.skip("this family has no text-only class of the same checkpoint")
    model = opened(family, root / "aligned", is_text_only=is_text_only)
    if route == "the seven names" and not any(module.endswith(tuple(SEVEN)) for module, _ in model.named_modules()):
        pytest.skip("this family has none of these names")
    if route == "the seven names" and not has_other_linear_modules(model):
        pytest.skip("all linear modules of this family have these names")
    plain = logits(model)
    host = adapted(model, family, route, dtype, tmp_path / "adapter")
    raw = logits(host)
    assert relative(raw, plain) > 1e-2

    adapter, subspace = csulora.load_adapter(tmp_path / "adapter"), csulora.Subspace.open(root / "subspace")
    if dtype == torch.float32:  # names do not depend on it
        base = opened(family, root / "base", is_text_only=is_text_only)
        check_subspaces(adapter, subspace, base, host.base_model.model)
    fixed = {}
    for policy in (csulora.Policy.none(), NOTHING, csulora.Policy.project()):
        corrected, report = csulora.correct(adapter, subspace, policy)
        assert len(report.measured) == len(adapter.modules)
        fixed[policy] = corrected
    csulora.save_adapter(fixed[csulora.Policy.none()], tmp_path / "kept")
    csulora.save_adapter(fixed[NOTHING], tmp_path / "nothing")
    reached = {
        "none": relative(with_adapter(host, tmp_path / "kept"), raw),
        "nothing": relative(with_adapter(host, tmp_path / "nothing"), plain),
        "project": projection_error(adapter, fixed[csulora.Policy.project()], subspace),
        "modules": len(adapter.modules),
    }
    assert reached["none"] <= SAME_LOGITS[dtype]
    assert reached["nothing"] <= 1e-4
    assert reached["project"] <= COMPUTED[torch.float32] + STORED[dtype]
    found = record.setdefault(name, {"on disk": layers(subspace), "in an adapter": []})
    found["in an adapter"] = sorted({*found["in an adapter"], layers(adapter.modules)})
    keep_worst(found, dtype, reached)


def test_a_text_only_base_fits_an_aligned_model_with_a_tower(tmp_path: Path) -> None:
    family = FAMILIES["Qwen 3.5"]
    model = built(family)
    model.save_pretrained(tmp_path / "aligned")
    move(model, seed=2000)
    model.save_pretrained(tmp_path / "base")
    opened(family, tmp_path / "base", is_text_only=True).save_pretrained(tmp_path / "text")

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
