"""What csulora says that PEFT would not apply is what PEFT does not apply; what csulora writes arrives in full."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import csulora
import factories
from csulora.models.names import bare
from expert_families import EXPERT_FAMILIES
from language_families import LANGUAGE_FAMILIES, Family
from model_families import FAMILIES, extracted, opened

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]

PREFIX = "base_model.model."
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "fc1", "fc2")
EXPERTS = EXPERT_FAMILIES | {"Qwen 2 MoE": LANGUAGE_FAMILIES["Qwen 2 MoE, shared"]}


def place(family: Family, root: Path, *ending: str, **config: object) -> tuple[csulora.Adapter, csulora.Subspace]:
    """An adapter whose modules are called as on disk, and a subspace file."""
    modules, subspace = extracted(family, root, *ending)
    return csulora.load_adapter(factories.save_adapter(root / "adapter", modules, **config)), subspace


def arrived(model: Any, path: Path) -> tuple[set[str], set[str]]:
    """The modules whose factors PEFT holds as the file has them, and the others."""
    host = PeftModel.from_pretrained(model, str(path)).state_dict()
    factors = {bare(name.replace(".default", "")): factor for name, factor in host.items() if "lora_" in name}
    found: dict[str, bool] = {}
    for name, factor in load_file(path / "adapter_model.safetensors").items():
        module = re.sub(r"\.lora_.*", "", name.removeprefix(PREFIX))
        same = bare(name) in factors and torch.equal(factors[bare(name)], factor)
        found[module] = found.get(module, True) and same
    return {name for name, same in found.items() if same}, {name for name, same in found.items() if not same}


def said(report: csulora.Report) -> int:
    """How many modules are said to be dropped."""
    return sum(int(found[1]) for note in report.host_notes if (found := re.search(r" drops (\d+) of", note)))


@pytest.mark.parametrize("name", ["Qwen 2.5 VL", "Qwen 2 VL", "Gemma 3", "Mistral 3", "Llama 3.2 Vision", "Qwen 3 VL"])
def test_old_names_are_told_and_written_anew(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    adapter, subspace = place(family, tmp_path, *SEVEN)
    fixed, report = csulora.correct(adapter, subspace, csulora.Policy.none())
    csulora.save_adapter(fixed, tmp_path / "fixed")

    _, lost = arrived(opened(family, tmp_path / "aligned"), tmp_path / "adapter")
    assert said(report) == len(lost)
    assert bool(lost) == (name != "Qwen 3 VL")
    applied, lost = arrived(opened(family, tmp_path / "aligned"), tmp_path / "fixed")
    assert (len(applied), lost) == (len(adapter.modules), set())

    again, report = csulora.correct(csulora.load_adapter(tmp_path / "fixed"), subspace, csulora.Policy.none())
    assert again.modules.keys() == fixed.modules.keys()
    assert report.host_notes == ()


@pytest.mark.parametrize("name", ["Qwen 2 MoE", "DeepSeek-V3", "GLM-4 MoE", "ERNIE 4.5 MoE", "Qwen 3 Next"])
def test_what_peft_drops_of_experts_and_beside_them_is_told(name: str, tmp_path: Path) -> None:
    family = EXPERTS[name]
    adapter, subspace = place(family, tmp_path, *SEVEN)
    _, report = csulora.correct(adapter, subspace, csulora.Policy.none())

    _, lost = arrived(opened(family, tmp_path / "aligned"), tmp_path / "adapter")
    routed = {module for module in lost if re.search(r"\.experts\.\d+\.", module)}
    assert routed  # PEFT converts them, or drops them with Qwen 2 MoE
    assert said(report) == len(lost if name == "Qwen 2 MoE" else lost - routed)


def test_the_scale_of_converted_experts_is_told(tmp_path: Path) -> None:
    endings = ("gate_proj", "up_proj", "down_proj")
    adapter, subspace = place(
        EXPERTS["Qwen 3 MoE"], tmp_path, *endings, use_rslora=True, alpha_pattern={"gate_proj": 16}
    )
    fixed, report = csulora.correct(adapter, subspace, csulora.Policy.none())
    assert [bool(re.search("sqrt|alpha_pattern", note)) for note in report.host_notes] == [True, True]
    csulora.save_adapter(fixed, tmp_path / "fixed")
    _, report = csulora.correct(csulora.load_adapter(tmp_path / "fixed"), subspace, csulora.Policy.none())
    assert report.host_notes == ()


def test_an_ordinary_adapter_has_no_note(tmp_path: Path) -> None:
    adapter, subspace = place(FAMILIES["Llama 3"], tmp_path, *SEVEN, use_rslora=True)
    _, report = csulora.correct(adapter, subspace, csulora.Policy.none())
    assert report.host_notes == ()
    assert report.to_dict()["host_notes"] == []
