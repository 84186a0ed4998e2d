"""Updates of experts from one layout to the other and back, and what is filled with zeros on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import csulora
import factories
from csulora.adapters.lora import REPORT_FILE
from csulora.errors import HostLimitError
from csulora.models.names import parse_expert
from expert_families import EXPERT_FAMILIES
from model_families import built

NONE = csulora.Policy.none()

# PEFT drops single experts of all but the first two. The checkpoint of the last holds none.
FAMILIES = ("Qwen 3 MoE", "Mixtral", "Qwen 2 MoE", "LFM2 MoE", "Jamba", "Granite MoE")


@pytest.fixture(scope="module", params=FAMILIES)
def subspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> csulora.Subspace:
    return subspace_of(request.param, tmp_path_factory.mktemp("family"))


def subspace_of(family: str, root: Path) -> csulora.Subspace:
    model = built(EXPERT_FAMILIES[family])
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * factories.gaussian(*parameter.shape, seed=1000 + i))
    model.save_pretrained(root / "aligned")
    return csulora.extract(root / "base", root / "aligned", rank=4, expert_rank=4)


@pytest.fixture
def one_by_one(subspace: csulora.Subspace, tmp_path: Path) -> Path:
    """An adapter as transformers 4 wrote it: a pair of factors for each expert and projection, under names on disk."""
    modules = {name: module.shape for name, module in subspace.items() if parse_expert(name) or "q_proj" in name}
    return factories.save_adapter(tmp_path / "adapter", modules)


def relaid(path: Path, subspace: csulora.Subspace, layout: str) -> Path:
    fixed, _ = csulora.correct(csulora.load_adapter(path), subspace, NONE, layout)
    csulora.save_adapter(fixed, path.with_name(layout))
    return path.with_name(layout)


def test_there_and_back_is_bit_identical(one_by_one: Path, subspace: csulora.Subspace) -> None:
    before = csulora.load_adapter(relaid(one_by_one, subspace, "per-expert"))
    fused = relaid(one_by_one, subspace, "fused")
    assert not any(".experts.0." in name for name in load_file(fused / "adapter_model.safetensors"))
    after = csulora.load_adapter(relaid(fused, subspace, "per-expert"))

    assert before.modules.keys() == after.modules.keys() == csulora.load_adapter(one_by_one).modules.keys()
    for name, module in before.modules.items():
        assert torch.equal(module.a, after.modules[name].a)
        assert torch.equal(module.b, after.modules[name].b)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_experts_that_an_adapter_leaves_out_are_zero(
    layout: str, one_by_one: Path, subspace: csulora.Subspace, tmp_path: Path
) -> None:
    whole = csulora.load_adapter(one_by_one)
    part = {name: module for name, module in whole.modules.items() if not name.endswith(("experts.2.up_proj", "2.w3"))}
    part = {name: module for name, module in part.items() if ".experts.3." not in name}
    fixed, _ = csulora.correct(replace(whole, modules=part, partial=True), subspace, NONE, layout)
    csulora.save_adapter(fixed, tmp_path / "part")
    found = csulora.load_adapter(relaid(tmp_path / "part", subspace, "per-expert"))

    assert found.modules.keys() == whole.modules.keys()
    for name, module in found.modules.items():
        expected = part[name].b * part[name].scale @ part[name].a if name in part else torch.zeros(module.shape)
        assert torch.allclose(module.b @ module.a, expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_what_was_relaid_follows(layout: str, one_by_one: Path, subspace: csulora.Subspace) -> None:
    """From one by one, and from fused as PEFT writes them today."""
    for source in (one_by_one, relaid(one_by_one, subspace, "fused")):
        out = source.with_name(f"{source.name}-{layout}")
        fixed, _ = csulora.correct(csulora.load_adapter(source), subspace, csulora.Policy.protect(), layout)
        csulora.save_adapter(fixed, out)
        assert all(check.holds for check in csulora.audit(out, source, subspace))
        report = json.loads((out / REPORT_FILE).read_text())
        assert report["layout"] == layout
        (out / REPORT_FILE).write_text(json.dumps(report | {"layout": "stacked"}))
        with pytest.raises(csulora.InputError, match="layout must be per-expert or fused"):
            csulora.audit(out, source, subspace)


def test_what_unsloth_ordered_follows_where_that_is_said(one_by_one: Path, subspace: csulora.Subspace) -> None:
    source = relaid(one_by_one, subspace, "fused")
    config = source / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"unsloth_fixed": True}))
    fixed, _ = csulora.correct(csulora.load_adapter(source, expert_layout="unsloth"), subspace, NONE)
    csulora.save_adapter(fixed, source.with_name("out"))
    for order, holds in (("unsloth", True), ("peft", False)):
        checks = csulora.audit(source.with_name("out"), source, subspace, expert_layout=order)
        assert all(check.holds for check in checks) == holds
    with pytest.raises(csulora.RefusedError, match="Say so"):
        csulora.audit(source.with_name("out"), source, subspace)


def test_an_unknown_layout_is_refused(one_by_one: Path, subspace: csulora.Subspace) -> None:
    with pytest.raises(csulora.InputError, match="must be per-expert or fused"):
        csulora.correct(csulora.load_adapter(one_by_one), subspace, NONE, "stacked")


@pytest.mark.parametrize("family", ["gpt-oss", "Gemma 4 MoE", "Llama 4 text"])
def test_one_by_one_is_refused_where_no_host_reads_it(family: str, tmp_path: Path) -> None:
    subspace = subspace_of(family, tmp_path)
    modules = {name: module.shape for name, module in subspace.items() if parse_expert(name)}
    adapter = csulora.load_adapter(factories.save_adapter(tmp_path / "adapter", modules))
    with pytest.raises(HostLimitError, match="reads this model's experts one by one; keep them fused"):
        csulora.correct(adapter, subspace, NONE, "per-expert")
    csulora.correct(adapter, subspace, NONE, "fused")


@pytest.mark.parametrize(("family", "is_dropped"), [("Qwen 3 MoE", False), ("Granite MoE", True)])
def test_what_peft_drops_of_what_is_written_is_told(family: str, is_dropped: bool, tmp_path: Path) -> None:
    subspace = subspace_of(family, tmp_path)
    modules = {name: module.shape for name, module in subspace.items() if parse_expert(name)}
    fused = relaid(factories.save_adapter(tmp_path / "adapter", modules), subspace, "fused")
    for layout in (None, "fused", "per-expert"):
        _, report = csulora.correct(csulora.load_adapter(fused), subspace, NONE, layout)
        told = any("an expert's; serve it with vLLM, or use --layout fused" in note for note in report.host_notes)
        assert told == (is_dropped and layout == "per-expert")
