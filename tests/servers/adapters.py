"""Adapters for the efficacy fixture's model, raw and corrected, good and bad, for tests with servers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

FIXTURE = Path(__file__).resolve().parents[2] / "bench" / "efficacy" / "fixture"
PREFIX = "base_model.model.model.layers"


def csulora(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "csulora", *map(str, arguments), "--quiet"], check=True)


def write(directory: Path, change, **settings: object) -> Path:
    """Copy the fixture's adapter in float32, with its tensors and its settings changed."""
    directory.mkdir()
    tensors = load_file(FIXTURE / "adapter" / "adapter_model.safetensors")
    save_file(change({name: t.float() for name, t in tensors.items()}), directory / "adapter_model.safetensors")
    config = json.loads((FIXTURE / "adapter" / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    return directory


def unchanged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


def reversed_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def with_absent_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {name.replace("layers.0", "layers.9"): tensor.clone() for name, tensor in tensors.items()}


def make(root: Path, policy: str) -> SimpleNamespace:
    """Write a subspace file and the adapters below ``root``; corrected ones are corrected with ``policy``."""
    subspace = root / "subspace.safetensors"
    csulora("extract", FIXTURE / "base", FIXTURE / "aligned", "-o", subspace, "--rank", 8)
    raw = {"one": write(root / "one", unchanged), "two": write(root / "two", reversed_rows, use_rslora=True)}
    corrected = {name: root / f"{name}-corrected" for name in raw}
    for name, directory in raw.items():
        csulora("correct", directory, "--subspace", subspace, "--policy", policy, "-o", corrected[name])
    bad = {
        "not a number": write(root / "nan", with_nan),
        "absent layer": write(root / "absent", with_absent_layer),
        "unknown key": write(root / "unknown", unchanged, frobnicate=True),
        "wrong rank": write(root / "rank", unchanged, r=4),
        "DoRA": write(root / "dora", unchanged, use_dora=True),
        "odd off value": write(root / "odd", unchanged, use_dora="none"),
        "no dropout": write(root / "dropout", unchanged, lora_dropout=2.0),
    }
    reasons = {
        "not a number": "NaN",
        "absent layer": "layers.9",
        "unknown key": "frobnicate",
        "wrong rank": "rank 4",
        "DoRA": "DoRA",
        "odd off value": "only false is off",
        "no dropout": "lora_dropout",
    }
    named = root / "named"
    named.mkdir()
    shutil.copytree(raw["two"], named / "good")
    shutil.copytree(bad["not a number"], named / "bad")
    return SimpleNamespace(
        root=root,
        model=FIXTURE / "aligned",
        subspace=subspace,
        raw=raw,
        corrected=corrected,
        bad=bad,
        reasons=reasons,
        named=named,
    )
