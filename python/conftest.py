"""What the examples in docstrings may use: files of a small model pair and of an adapter for it, and both opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import csulora

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
WIDTH = 24


def _gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _checkpoints(directory: Path) -> tuple[Path, Path]:
    base = {f"{name}.weight": _gaussian(WIDTH, WIDTH, at) for at, name in enumerate(MODULES)}
    moved = (_gaussian(WIDTH, 2, 10 + at) @ _gaussian(2, WIDTH, 20 + at) for at in range(len(MODULES)))
    aligned = {name: weight + change for (name, weight), change in zip(base.items(), moved, strict=True)}
    for side, weights in (("base", base), ("aligned", aligned)):
        (directory / side).mkdir()
        (directory / side / "config.json").write_text('{"model_type": "llama"}')
        save_file(weights, directory / side / "model.safetensors")
    return directory / "base", directory / "aligned"


def _adapter(path: Path) -> Path:
    modules = {
        name: csulora.LoraModule(_gaussian(WIDTH, 3, 30 + at), _gaussian(3, WIDTH, 40 + at))
        for at, name in enumerate(MODULES)
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}
    csulora.save_adapter(csulora.Adapter(modules, config, path.with_name("unsaved"), ""), path)
    return path


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``base`` and ``aligned`` checkpoints, an ``adapter`` directory and a ``subspace`` file, by these names."""
    directory = tmp_path_factory.mktemp("example")
    base, aligned = _checkpoints(directory)
    subspace = directory / "subspace.safetensors"
    csulora.extract(base, aligned, output=subspace, rank=2)
    return {"base": base, "aligned": aligned, "adapter": _adapter(directory / "adapter"), "subspace": subspace}


@pytest.fixture(autouse=True)
def _examples(doctest_namespace: dict[str, Any], example_files: dict[str, Path]) -> None:
    """Let ``example()`` return the adapter and the subspace, opened."""

    def example() -> tuple[csulora.Adapter, csulora.Subspace]:
        return csulora.load_adapter(example_files["adapter"]), csulora.Subspace.open(example_files["subspace"])

    doctest_namespace["example"] = example
    doctest_namespace["files"] = example_files
