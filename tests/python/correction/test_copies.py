"""Copies of embedding and head, as PEFT saves them: the aligned checkpoint's are left out, others are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import csulora
import zoo
from csulora.errors import InputError, RefusedError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TARGETS = ["embed_tokens", "lm_head", "q_proj"]
HEAD = "base_model.model.lm_head.base_layer.weight"
NONE = csulora.Policy.none()


@pytest.fixture(scope="module", params=["untied", "tied"])
def model_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an aligned checkpoint in bfloat16."""
    paths = zoo.save_model_pair(
        zoo.llama if request.param == "untied" else zoo.tied_llama, tmp_path_factory.mktemp("x")
    )
    for path in paths:
        LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def subspace(model_pair: tuple[Path, Path]) -> csulora.Subspace:
    return csulora.extract(*model_pair, rank=4, modules=["q_proj", "embed_tokens", "lm_head"], keep_noise=True)


def save(aligned: Path, directory: Path, dtype: torch.dtype = torch.bfloat16, **save: bool) -> PeftModel:
    """Save an adapter for embedding and head of the aligned model, loaded in a type."""
    model = LlamaForCausalLM.from_pretrained(aligned, dtype=dtype)
    config = LoraConfig(target_modules=TARGETS, init_lora_weights=False, r=4, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(directory), **save)
    return adapted


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(8)[None]).logits
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_of_the_aligned_checkpoint_are_left_out(
    dtype: torch.dtype, model_pair: tuple[Path, Path], subspace: csulora.Subspace, tmp_path: Path
) -> None:
    """Also where the model was loaded in a wider type than its checkpoint's."""
    adapted = save(model_pair[1], tmp_path / "adapter", dtype)
    subspace.save(tmp_path / "subspace.safetensors")
    fixed, report = csulora.correct(
        csulora.load_adapter(tmp_path / "adapter"), csulora.Subspace.open(tmp_path / "subspace.safetensors"), NONE
    )
    assert report.copies == ("lm_head", "model.embed_tokens")
    csulora.save_adapter(fixed, tmp_path / "fixed")
    assert not any("base_layer" in name for name in load_file(tmp_path / "fixed" / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "fixed" / "csulora_report.json").read_text())["copies"] == list(report.copies)
    fresh = LlamaForCausalLM.from_pretrained(model_pair[1], dtype=dtype)
    written = PeftModel.from_pretrained(fresh, tmp_path / "fixed")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(logits(written), logits(adapted), rtol=tolerance, atol=tolerance)


def flip_a_bit(copy: Tensor) -> Tensor:
    copy.view(torch.int16)[3, 3] ^= 1
    return copy


def swap_two_rows(copy: Tensor) -> Tensor:
    return copy.roll(1, 0)


def move_below_the_rounding(copy: Tensor) -> Tensor:
    return copy.float() * (1 + 2**-12)


@pytest.mark.parametrize("change", [flip_a_bit, swap_two_rows, move_below_the_rounding])
def test_a_copy_that_differs_is_refused_until_it_is_left_out(
    change: Callable[[Tensor], Tensor], model_pair: tuple[Path, Path], subspace: csulora.Subspace, tmp_path: Path
) -> None:
    adapted = save(model_pair[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: change(tensors[HEAD].clone()).contiguous()}, file)
    adapter = csulora.load_adapter(tmp_path / "adapter")
    for attempt in (lambda: csulora.correct(adapter, subspace, NONE), lambda: csulora.combine([adapter], subspace)):
        with pytest.raises(RefusedError, match=r"lm_head that differs .*save_embedding_layers=False"):
            attempt()
    adapted.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    _, report = csulora.correct(csulora.load_adapter(tmp_path / "again"), subspace, NONE)
    assert report.copies == ()


def test_a_subspace_file_without_hashes_refuses_copies_until_it_is_extracted_again(
    model_pair: tuple[Path, Path], subspace: csulora.Subspace, tmp_path: Path
) -> None:
    save(model_pair[1], tmp_path / "adapter")
    csulora.Subspace(subspace, replace(subspace.provenance, vocabulary={})).save(tmp_path / "old.safetensors")
    adapter = csulora.load_adapter(tmp_path / "adapter")
    with pytest.raises(RefusedError, match=r"no hash to compare it with; .*extract the subspace file again"):
        csulora.correct(adapter, csulora.Subspace.open(tmp_path / "old.safetensors"), NONE)
    csulora.correct(adapter, subspace, NONE)


def test_copies_are_not_exported_unseen(model_pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapted = save(model_pair[1], tmp_path / "adapter")
    with pytest.raises(RefusedError, match=r"only a correction compares .*save_embedding_layers=False"):
        csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "out")
    adapted.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    csulora.save_adapter(csulora.load_adapter(tmp_path / "again"), tmp_path / "out")


@pytest.mark.parametrize(
    "record",
    [{}, {"dtype": "BF16", "shape": [1], "sha256": "0" * 64}, {"dtype": "BF16", "shape": [1, 1], "sha256": "0"}],
)
def test_damaged_hashes_are_a_damaged_file(
    record: dict[str, object], subspace: csulora.Subspace, tmp_path: Path
) -> None:
    damaged = replace(subspace.provenance, vocabulary={"lm_head": record})  # type: ignore[dict-item]
    csulora.Subspace(subspace, damaged).save(tmp_path / "damaged.safetensors")
    with pytest.raises(InputError, match="metadata is damaged"):
        csulora.Subspace.open(tmp_path / "damaged.safetensors")
