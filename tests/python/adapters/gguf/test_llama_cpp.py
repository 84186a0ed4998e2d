"""llama.cpp with our file against PEFT with the original, family by family, in float32.

`CSULORA_RECORD=1` writes what was reached to bench/results, from where the table of serving/llama-cpp.md comes.
"""

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import csulora
import gguf_files
import gguf_zoo
from csulora.adapters.expert_encoding import Layout
from csulora.errors import InputError, RefusedError

pytestmark = [
    pytest.mark.llama_cpp,
    # PEFT 0.21 asks transformers 5 by an old name, and says of patterns for experts that they are not in force.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
llama_cpp = pytest.importorskip("llama_cpp")

RECORD = Path(__file__).parents[4] / "bench" / "results" / "compatibility" / "gguf.json"
LARGEST_DIFFERENCE = 1e-3

Figures = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every family's GGUF file and directory."""
    directory = tmp_path_factory.mktemp("models")
    for family in gguf_zoo.FAMILIES:
        gguf_zoo.save_gguf(family, directory / f"{family}.gguf")
        gguf_zoo.save_model(family, directory / family)
    return directory


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """What was measured, by family and kind of adapter."""
    found: Figures = {}
    yield found
    if os.environ.get("CSULORA_RECORD") and found.keys() == gguf_zoo.FAMILIES.keys():
        versions = {package.__name__: package.__version__ for package in (llama_cpp, peft, transformers)}
        RECORD.write_text(json.dumps({"versions": versions, "families": found}, indent=1) + "\n")


@pytest.mark.parametrize("kind", gguf_zoo.ADAPTERS)
@pytest.mark.parametrize("family", gguf_zoo.FAMILIES)
def test_llama_cpp_computes_what_peft_computes(
    family: str, kind: str, files: Path, figures: Figures, tmp_path: Path
) -> None:
    base = files / f"{family}.gguf"
    adapted = gguf_zoo.make_adapter(family, tmp_path / "adapter", **gguf_zoo.ADAPTERS[kind])
    lora = tmp_path / "lora.gguf"
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), lora, "gguf", base_model=files / family)

    expected, unadapted = gguf_zoo.logits(adapted), gguf_zoo.logits(gguf_zoo.model(family))
    found = {
        "difference": float(np.abs(gguf_zoo.llama_logits(base, lora) - expected).max()),
        "without_adapter": float(np.abs(gguf_zoo.llama_logits(base) - unadapted).max()),
        "effect": float(np.abs(unadapted - expected).max()),
    }
    figures.setdefault(family, {"architecture": gguf_zoo.FAMILIES[family].architecture})[kind] = found
    assert found["effect"] > 100 * LARGEST_DIFFERENCE
    assert found["difference"] <= LARGEST_DIFFERENCE


WITH_EXPERTS = [name for name, family in gguf_zoo.FAMILIES.items() if family.parameters]


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_corrected_updates_of_experts_are_pefts(family: str, files: Path, figures: Figures, tmp_path: Path) -> None:
    base, lora = files / f"{family}.gguf", tmp_path / "lora.gguf"
    gguf_zoo.make_adapter(family, tmp_path / "adapter")
    gguf_zoo.moved(family).save_pretrained(tmp_path / "aligned")
    subspace = csulora.extract(files / family, tmp_path / "aligned", rank=8)
    corrected, _ = csulora.correct(csulora.load_adapter(tmp_path / "adapter"), subspace, csulora.Policy.protect(1.0))
    csulora.save_adapter(corrected, lora, base_model=base)
    csulora.save_adapter(corrected, tmp_path / "corrected")

    unadapted = gguf_zoo.logits(gguf_zoo.model(family))
    expected = gguf_zoo.logits(
        peft.PeftModel.from_pretrained(deepcopy(gguf_zoo.model(family)), str(tmp_path / "corrected"))
    )
    found = {
        "difference": float(np.abs(gguf_zoo.llama_logits(base, lora) - expected).max()),
        "without_adapter": float(np.abs(gguf_zoo.llama_logits(base) - unadapted).max()),
        "effect": float(np.abs(unadapted - expected).max()),
    }
    figures.setdefault(family, {"architecture": gguf_zoo.FAMILIES[family].architecture})["corrected"] = found
    assert found["effect"] > 100 * LARGEST_DIFFERENCE
    assert found["difference"] <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("family", [name for name in WITH_EXPERTS if not gguf_zoo.FAMILIES[name].wrap])
def test_updates_of_experts_come_back(family: str, files: Path, tmp_path: Path) -> None:
    """They are named as PEFT's are, also if they are written again, and PEFT loads them from a directory."""
    base, first, second = files / f"{family}.gguf", tmp_path / "first.gguf", tmp_path / "second.gguf"
    made = gguf_zoo.make_adapter(family, tmp_path / "adapter", rank_pattern={"experts.down_proj": 3})
    adapter = csulora.load_adapter(tmp_path / "adapter")
    csulora.save_adapter(adapter, first, base_model=base, outtype="f32")
    read = csulora.load_adapter(first, base)
    csulora.save_adapter(read, second, base_model=base)
    again = csulora.load_adapter(second, base)
    csulora.save_adapter(read, tmp_path / "directory", "peft")
    assert read.modules.keys() == again.modules.keys() == adapter.modules.keys()
    for name, module in adapter.modules.items():
        update = module.scale * module.b.double() @ module.a.double()
        for found in (read.modules[name], again.modules[name]):
            written = found.scale * found.b.double() @ found.a.double()
            torch.testing.assert_close(written, update, rtol=1e-5, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(deepcopy(gguf_zoo.model(family)), str(tmp_path / "directory"))
    assert np.abs(gguf_zoo.logits(loaded) - gguf_zoo.logits(made)).max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["embed_tokens", "lm_head", "q_proj"]), ("qwen2", ["embed_tokens"]), ("qwen3", ["lm_head"])],
)
def test_embedding_and_head_where_they_are_two(family: str, targets: list[str], tmp_path: Path) -> None:
    base = gguf_zoo.save_gguf(family, tmp_path / "base.gguf")
    adapted = gguf_zoo.make_adapter(family, tmp_path / "adapter", target_modules=targets)
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "lora.gguf", "gguf", base_model=base)
    expected = gguf_zoo.logits(adapted)
    assert np.abs(gguf_zoo.llama_logits(base, tmp_path / "lora.gguf") - expected).max() <= LARGEST_DIFFERENCE
    assert np.abs(gguf_zoo.llama_logits(base) - expected).max() > 100 * LARGEST_DIFFERENCE


@pytest.mark.parametrize("family", sorted(gguf_zoo.FAMILIES.keys() - {"falcon-h1"}))
def test_a_directory_as_base_model_gives_the_same_file(family: str, tmp_path: Path) -> None:
    """Also for architectures whose head size is not width / heads."""
    gguf_zoo.make_adapter(family, tmp_path / "adapter")
    bases = (gguf_zoo.save_gguf(family, tmp_path / "tiny.gguf"), gguf_zoo.save_model(family, tmp_path / "tiny"))
    written = [tmp_path / f"{i}.gguf" for i in range(2)]
    for base, file in zip(bases, written, strict=True):
        csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), file, "gguf", base_model=base)
    assert written[0].read_bytes() == written[1].read_bytes()


def test_a_file_that_lacks_its_multipliers_is_no_base_model(tmp_path: Path) -> None:
    """The directory states them; an adapter comes back from GGUF as it was."""
    gguf_zoo.make_adapter("falcon-h1", tmp_path / "adapter")
    adapter, lora = csulora.load_adapter(tmp_path / "adapter"), tmp_path / "lora.gguf"
    base = gguf_zoo.save_gguf("falcon-h1", tmp_path / "base.gguf")
    with pytest.raises(RefusedError, match=r"factors of the configuration.*name the Hugging Face directory"):
        csulora.save_adapter(adapter, lora, "gguf", base_model=base)
    base = gguf_zoo.save_model("falcon-h1", tmp_path / "base")
    csulora.save_adapter(adapter, lora, "gguf", base_model=base)
    with pytest.raises(InputError, match=r"name the base model \(--base-model\)"):
        csulora.load_adapter(lora)
    for name, module in csulora.load_adapter(lora, base).modules.items():
        expected = adapter.modules[name].folded()
        assert torch.allclose(module.folded().b, expected.b, rtol=1e-6)
        assert torch.equal(module.a, expected.a)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("mixtral", "fused"), ("mixtral", "per-expert"), ("qwen3moe", "per-expert"), ("lfm2moe", "fused")],
)
def test_updates_from_gguf_in_another_layout(family: str, layout: Layout, tmp_path: Path) -> None:
    base = gguf_zoo.save_gguf(family, tmp_path / "base.gguf")
    gguf_zoo.moved(family).save_pretrained(tmp_path / "aligned")
    subspace = csulora.extract(gguf_zoo.save_model(family, tmp_path / "base"), tmp_path / "aligned", rank=2)
    expected = gguf_zoo.logits(gguf_zoo.make_adapter(family, tmp_path / "adapter"))
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "lora.gguf", base_model=base)

    raw = csulora.load_adapter(tmp_path / "lora.gguf", base)
    same, _ = csulora.correct(raw, subspace, csulora.Policy.none(), layout=layout)
    csulora.save_adapter(same, tmp_path / "directory", "peft")
    loaded = peft.PeftModel.from_pretrained(deepcopy(gguf_zoo.model(family)), str(tmp_path / "directory"))
    assert np.abs(gguf_zoo.logits(loaded) - expected).max() <= LARGEST_DIFFERENCE


def test_llama_cpp_reads_the_other_types(tmp_path: Path) -> None:
    """It rounds what it multiplies with to the adapter's type, so it is less exact."""
    base = gguf_zoo.save_gguf("llama", tmp_path / "base.gguf")
    expected = gguf_zoo.logits(gguf_zoo.make_adapter("llama", tmp_path / "adapter"))
    for outtype, tolerance in (("f16", 1e-2), ("bf16", 5e-2)):
        file, adapter = tmp_path / f"{outtype}.gguf", csulora.load_adapter(tmp_path / "adapter")
        csulora.save_adapter(adapter, file, "gguf", base_model=base, outtype=outtype)
        assert np.abs(gguf_zoo.llama_logits(base, file) - expected).max() <= tolerance


IGNORED = "per_layer_model_projection"


def test_an_update_that_llama_cpp_ignores_is_refused(tmp_path: Path) -> None:
    """If llama.cpp stops ignoring it, the first assertion fails, and the module can be supported."""
    base = gguf_zoo.save_gguf("gemma4", tmp_path / "base.gguf")
    factors = {"a": torch.ones(2, 32), "b": torch.ones(16, 2)}
    tensors = {f"per_layer_model_proj.weight.lora_{factor}": matrix for factor, matrix in factors.items()}
    lora = gguf_files.save_lora(tmp_path / "lora.gguf", tensors, name="gemma4")
    assert np.array_equal(gguf_zoo.llama_logits(base, lora), gguf_zoo.llama_logits(base))

    gguf_zoo.make_adapter("gemma4", tmp_path / "adapter", target_modules=["q_proj", IGNORED])
    with pytest.raises(RefusedError, match=rf"llama\.cpp ignores updates of model\.{IGNORED}; train without it.*merge"):
        csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "o.gguf", "gguf", base_model=base)
    with pytest.raises(RefusedError, match=r"per_layer_model_proj\.weight.* llama\.cpp ignores it; train without"):
        csulora.load_adapter(lora, base)


def test_a_merged_model_holds_what_llama_cpp_would_ignore(tmp_path: Path) -> None:
    adapted = gguf_zoo.make_adapter("gemma4", tmp_path / "adapter", target_modules=["q_proj", IGNORED])
    expected = gguf_zoo.logits(adapted)
    merged = gguf_zoo.convert(adapted.merge_and_unload(), tmp_path / "merged.gguf", "merged")
    assert np.abs(gguf_zoo.llama_logits(merged) - expected).max() <= LARGEST_DIFFERENCE


def test_an_update_of_the_tower_is_refused(tmp_path: Path) -> None:
    base = gguf_zoo.save_gguf("gemma3 (vision)", tmp_path / "base.gguf")
    gguf_zoo.make_adapter("gemma3 (vision)", tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(RefusedError, match=r"has no gemma3 tensor for .*vision_tower.*; train without it"):
        csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "o.gguf", "gguf", base_model=base)
