"""llama.cpp with our file against PEFT with the original, architecture by architecture, in float32."""

from pathlib import Path

import numpy as np
import pytest

import csulora
import gguf_zoo

# PEFT 0.21 asks transformers 5 by an old name.
pytestmark = [pytest.mark.llama_cpp, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
pytest.importorskip("llama_cpp")

LARGEST_DIFFERENCE = 1e-3


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every family's GGUF file."""
    directory = tmp_path_factory.mktemp("models")
    for family in gguf_zoo.FAMILIES:
        gguf_zoo.save_gguf(family, directory / f"{family}.gguf")
    return directory


@pytest.mark.parametrize("kind", gguf_zoo.ADAPTERS)
@pytest.mark.parametrize("family", gguf_zoo.FAMILIES)
def test_llama_cpp_computes_what_peft_computes(family: str, kind: str, files: Path, tmp_path: Path) -> None:
    base = files / f"{family}.gguf"
    adapted = gguf_zoo.make_adapter(family, tmp_path / "adapter", **gguf_zoo.ADAPTERS[kind])
    lora = tmp_path / "lora.gguf"
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), lora, "gguf", base_model=base)

    expected = gguf_zoo.logits(adapted)
    difference = np.abs(gguf_zoo.llama_logits(base, lora) - expected).max()
    effect = np.abs(gguf_zoo.logits(gguf_zoo.model(family)) - expected).max()
    noise = np.abs(gguf_zoo.llama_logits(base) - gguf_zoo.logits(gguf_zoo.model(family))).max()
    print(f"{family}, {kind}: {difference:.1e}; without an adapter {noise:.1e}; the adapter's effect {effect:.1e}")
    assert effect > 100 * LARGEST_DIFFERENCE
    assert difference <= LARGEST_DIFFERENCE
