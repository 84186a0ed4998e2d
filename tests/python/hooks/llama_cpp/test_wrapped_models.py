"""The hook with models that also see, whose rows are reordered, or that have experts: names, orders, correction."""

from contextlib import closing
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import csulora
import gguf_files
import gguf_zoo
from csulora.errors import InputError

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
pytest.importorskip("llama_cpp")

from csulora.hooks import llama_cpp as hook  # noqa: E402 - needs the library

TOLERANCE = 1e-3
EXACT = {"n_ctx": 256, "logits_all": True, "n_threads": 1, "verbose": False, "type_k": 0, "type_v": 0}


@pytest.mark.parametrize(
    "family", ["qwen35", "qwen35 (vision)", "gemma3 (vision)", "qwen3moe", "gpt-oss", "gemma4 (experts)"]
)
@pytest.mark.parametrize("kind", ["directories", "files"])
def test_corrects_on_load(family: str, kind: str, tmp_path: Path) -> None:
    """The subspace comes from directories or from GGUF files, the adapter in the format of neither or both."""
    aligned = gguf_zoo.save_gguf(family, tmp_path / "aligned.gguf")
    if kind == "files":
        base = gguf_zoo.convert(gguf_zoo.moved(family), tmp_path / "base.gguf", "base")
        subspace = csulora.extract(base, aligned, rank=2)
    else:
        gguf_zoo.moved(family).save_pretrained(tmp_path / "base")
        gguf_zoo.save_model(family, tmp_path / "aligned")
        subspace = csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=2)
    raw = gguf_zoo.make_adapter(family, tmp_path / "adapter")
    policy = csulora.Policy.project()

    fixed, _ = csulora.correct(csulora.load_adapter(tmp_path / "adapter"), subspace, policy)
    csulora.save_adapter(fixed, tmp_path / "fixed")
    expected = gguf_zoo.logits(PeftModel.from_pretrained(deepcopy(gguf_zoo.model(family)), tmp_path / "fixed"))
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "raw.gguf", "gguf", base_model=aligned)

    for adapter in ("adapter", "raw.gguf"):
        cache = tmp_path / "cache"
        with closing(hook.load(aligned, tmp_path / adapter, subspace, policy, cache=cache, **EXACT)) as llama:
            found = gguf_zoo.evaluate(llama)
        assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(gguf_zoo.logits(raw) - expected).max() > 10 * TOLERANCE


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts_is_refused(experts: int, tmp_path: Path) -> None:
    """llama.cpp loads such a file; if it stops doing so, the first assertion fails."""
    model = gguf_zoo.save_gguf("qwen3moe", tmp_path / "aligned.gguf")
    base = gguf_zoo.convert(gguf_zoo.moved("qwen3moe"), tmp_path / "base.gguf", "base")
    factors = {"a": torch.zeros(experts, 2, 32), "b": torch.zeros(experts, 24, 2)}
    tensors = {f"blk.0.ffn_up_exps.weight.lora_{factor}": stacked for factor, stacked in factors.items()}
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", tensors, "qwen3moe")
    with closing(gguf_zoo.open_llama(model, lora_path=str(lora))) as llama:
        assert llama.n_ctx() > 0
    subspace = csulora.extract(base, model, rank=2)
    with pytest.raises(InputError, match=rf"ffn_up_exps has updates of {experts} experts, but .*aligned\.gguf has 4"):
        hook.load(model, lora, subspace, csulora.Policy.none(), cache=tmp_path / "cache", **EXACT)
