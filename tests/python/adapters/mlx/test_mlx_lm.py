"""The real mlx-lm with our files, on the CPU, against PEFT and against itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import csulora
import factories
from model_families import FAMILIES, TOKENS

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
pytest.importorskip("mlx_lm")

LARGEST_DIFFERENCE = 2e-4
# Of which mlx-lm itself computes what transformers does, with a configuration as small as this.
MLX_FAMILIES = ["Llama 3", "Qwen 3", "Phi 3", "Gemma 2", "Llava"]
TARGETS = r"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.\w*proj"


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family].model)(FAMILIES[family].config()).eval()
    for i, parameter in enumerate(parameter for parameter in model.parameters() if parameter.dim() >= 2):
        parameter.data.copy_(0.2 * factories.gaussian(*parameter.shape, seed=i))
    return model


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits of mlx-lm."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    loaded, _ = load_model(model)
    if adapter is not None:
        loaded = load_adapters(loaded, str(adapter))
    return np.array(loaded(mx.array([TOKENS])).astype(mx.float32))


def make_adapter(model: Path, directory: Path, **parameters: Any) -> None:
    """Save an adapter as mlx-lm does, with random factors in all modules that it adapts by itself."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    loaded, _ = load_model(model)
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0} | parameters
    linear_to_lora_layers(loaded, 2, settings)
    mx.random.seed(0)
    factors = [(name, value.shape) for name, value in tree_flatten(loaded.parameters()) if ".lora_" in name]
    directory.mkdir()
    tensors = {name: mx.random.normal(shape) / 8 for name, shape in factors}
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings, "model": str(model), "iters": 100}
    save_config(config, directory / "adapter_config.json")


@pytest.fixture(scope="module", params=["Llama 3", "Llava"])
def model_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pair")
    model = build(request.param)
    model.save_pretrained(directory / "base")
    model.load_state_dict(factories.moved(model.state_dict()))
    model.save_pretrained(directory / "aligned")
    return directory / "base", directory / "aligned"


@pytest.fixture(scope="module")
def subspace(model_pair: tuple[Path, Path]) -> csulora.Subspace:
    return csulora.extract(*model_pair, rank=6, modules=["*_proj", "lm_head"], dtype="f32")


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "lm_head", "language_model.lm_head"]])
def test_mlx_lm_computes_the_same_before_and_after(
    keys: list[str] | None, model_pair: tuple[Path, Path], subspace: csulora.Subspace, tmp_path: Path
) -> None:
    aligned = model_pair[1]
    make_adapter(aligned, tmp_path / "adapter", keys=keys)
    adapter = csulora.load_adapter(tmp_path / "adapter")
    fixed, _ = csulora.correct(adapter, subspace, csulora.Policy.none())
    csulora.save_adapter(fixed, tmp_path / "fixed")
    expected, found = logits(aligned, tmp_path / "adapter"), logits(aligned, tmp_path / "fixed")
    assert np.abs(expected - logits(aligned)).max() > 0.1
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest difference {difference:.1e} of the largest logit")
    assert difference < 1e-5
    corrected, _ = csulora.correct(adapter, subspace, csulora.Policy(aligned=np.inf, partial=np.inf, off=np.inf))
    csulora.save_adapter(corrected, tmp_path / "removed")
    assert np.abs(logits(aligned, tmp_path / "removed") - logits(aligned)).max() < 1e-4


@pytest.mark.parametrize("family", MLX_FAMILIES)
def test_what_peft_trained_means_the_same_to_mlx_lm(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    config = LoraConfig(
        target_modules=TARGETS, init_lora_weights=False, r=4, use_rslora=True, rank_pattern={"k_proj": 2}
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "mlx", "mlx")
    with torch.no_grad():
        expected = adapted(torch.tensor([TOKENS])).logits.float().numpy()
    difference = np.abs(logits(tmp_path / "model", tmp_path / "mlx") - expected).max()
    noise = np.abs(expected - logits(tmp_path / "model")).max()
    print(f"{family}: {difference:.1e}; the adapter's effect {noise:.1e}")
    assert noise > 100 * LARGEST_DIFFERENCE
    assert difference < LARGEST_DIFFERENCE
    assert set(json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["keys"]) == {
        name.rpartition(".")[0] for name in load_file(tmp_path / "mlx" / "adapters.safetensors")
    }
