"""Both directions of llama.cpp's layout: a model's weights and an adapter come back as Hugging Face has them."""

from pathlib import Path

import pytest
import torch

import csulora
from csulora.models import names
from csulora.models.gguf_file import GGUFFile

gguf_zoo = pytest.importorskip("gguf_zoo")

# PEFT 0.21 asks transformers 5 by an old name, and says of patterns for experts that they are not in force.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

# One of each layout, and two that see.
FAMILIES = [
    "llama",
    "ministral3 (vision)",
    "gemma3 (vision)",
    "qwen35",
    "qwen35 (vision)",
    "qwen3next",
    "gemma4",
    "lfm2",
    "glm4",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_subspaces_are_the_same_whatever_the_format(family: str, tmp_path: Path) -> None:
    pair = {"base": gguf_zoo.model(family), "aligned": gguf_zoo.moved(family)}
    for name, model in pair.items():
        model.save_pretrained(tmp_path / name)
        gguf_zoo.convert(model, tmp_path / f"{name}.gguf", name)
    of_files = csulora.extract(tmp_path / "base.gguf", tmp_path / "aligned.gguf", rank=2)
    of_directories = csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=2)

    mixed = csulora.extract(tmp_path / "base", tmp_path / "aligned.gguf", rank=2)

    expected = {names.bare(name): module for name, module in of_directories.items()}
    updated = {names.bare(name) for name in adapter_modules(family, tmp_path) if not names.is_expert(name)}
    assert updated <= {names.bare(name) for name in of_files}
    for name, module in of_files.items():
        for factor in ("u", "s", "v"):
            assert torch.equal(getattr(module, factor), getattr(expected[names.bare(name)], factor))
            assert torch.equal(getattr(module, factor), getattr(mixed[name], factor))


def adapter_modules(family: str, directory: Path) -> dict[str, csulora.LoraModule]:
    gguf_zoo.make_adapter(family, directory / "adapter")
    return csulora.load_adapter(directory / "adapter").modules


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    base, lora = gguf_zoo.save_gguf(family, tmp_path / "base.gguf"), tmp_path / "lora.gguf"
    original = {names.bare(name): module.folded() for name, module in adapter_modules(family, tmp_path).items()}
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), lora, "gguf", base_model=base)
    back = {names.bare(name): module for name, module in csulora.load_adapter(lora, base).modules.items()}
    assert back.keys() == original.keys()
    for name, module in back.items():
        assert torch.equal(module.b, original[name].b)
        assert torch.equal(module.a, original[name].a)


@pytest.mark.parametrize(("text", "vision"), [("gemma3", "gemma3 (vision)"), ("qwen35", "qwen35 (vision)")])
def test_the_class_that_an_adapter_was_trained_in_makes_no_difference(text: str, vision: str, tmp_path: Path) -> None:
    """The factors are numbered alike: the language model's modules stand in the same order in both classes."""
    base = gguf_zoo.save_gguf(text, tmp_path / "base.gguf")
    files = []
    for family in (text, vision):
        gguf_zoo.make_adapter(family, tmp_path / family)
        csulora.save_adapter(csulora.load_adapter(tmp_path / family), tmp_path / "lora.gguf", "gguf", base_model=base)
        files.append(GGUFFile.read(tmp_path / "lora.gguf", 1 << 20))
    assert files[0].tensors.keys() == files[1].tensors.keys()
    assert all(files[0].bytes_of(tensor) == files[1].bytes_of(tensor) for tensor in files[0].tensors)
