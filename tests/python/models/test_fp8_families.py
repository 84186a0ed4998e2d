"""FP8 models as transformers itself loads them: Ministral 3's layout, one scale per matrix, beside a plain base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import csulora
import factories
import quantised
from csulora.models.checkpoint import Checkpoint
from csulora.models.resolver import Resolver
from model_families import FAMILIES, Family

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KIND = quantised.KINDS["one scale"]


def save_moved(plain: Path, directory: Path) -> None:
    """Save an aligned copy of a model, in FP8."""
    tensors, _ = quantised.quantise(factories.moved(load_file(plain / "model.safetensors")), KIND)
    config = json.loads((plain / "config.json").read_text())
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": KIND.settings}))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=["Llama 3", "Mistral 3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family's base checkpoint, and its aligned one in FP8."""
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    getattr(transformers, family.model)(family.config()).bfloat16().save_pretrained(root / "base")
    save_moved(root / "base", root / "aligned")
    return family, root


def opened(family: Family, root: Path) -> Any:
    config = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=None)
    loader = getattr(transformers, family.model)
    return loader.from_pretrained(root / "aligned", quantization_config=config, dtype=torch.float32)


def test_every_matrix_is_what_transformers_loads(place: tuple[Family, Path]) -> None:
    family, root = place
    checkpoint = Checkpoint.open(root / "aligned")
    resolver = Resolver(checkpoint.weights, checkpoint.aliases)
    compared = 0
    for name, parameter in opened(family, root).named_parameters():
        if parameter.dim() == 2 and (found := resolver.resolve(name.removesuffix(".weight"))):
            assert torch.equal(checkpoint.load(found.module)[0].float(), parameter.data)
            compared += 1
    assert compared >= len(checkpoint.weights)


def test_an_adapter_for_the_fp8_model_is_corrected_in_every_module(place: tuple[Family, Path], tmp_path: Path) -> None:
    family, root = place
    subspace = csulora.extract(root / "base", root / "aligned", rank=4)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(opened(family, root), settings).save_pretrained(str(tmp_path / "adapter"))
    adapter = csulora.load_adapter(tmp_path / "adapter")
    _, report = csulora.correct(adapter, subspace, csulora.Policy.project())
    assert len(report.measured) == len(adapter.modules) >= 14
