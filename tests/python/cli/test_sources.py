"""The command line on adapters of every source: mlx-lm's, the hub's, and those that hold copies of base matrices."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
from commands import Run
from csulora.cli import exit_codes

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}
CORRECT = "correct {} --subspace subspace --policy csulora -o {} --json {}"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a subspace file of an untied model and an adapter for it."""
    monkeypatch.chdir(tmp_path)
    csulora.extract(*factories.model_pair(tmp_path), rank=6).save("subspace")
    factories.save_adapter(tmp_path / "adapter", SHAPES, use_rslora=True)
    return tmp_path


def test_corrects_into_mlx_and_back(work: Path, run: Run) -> None:
    """An MLX adapter stays one unless another format is asked for."""
    assert run(CORRECT.format("adapter", "one", "a.json") + " --format mlx")[0] == 0
    code, out, err = run(CORRECT.format("one", "two", "b.json"))
    assert code == 0
    assert "wrote two, a directory for mlx-lm" in out + err
    assert (work / "two" / "adapters.safetensors").is_file()
    assert run("inspect two")[0] == 0
    assert run("verify two one subspace")[0] == 0
    assert run(CORRECT.format("one", "three", "c.json") + " --format peft")[0] == 0
    two, three = csulora.load_adapter("two"), csulora.load_adapter("three")
    for name, module in two.modules.items():
        assert torch.allclose(module.b @ module.a, three.modules[name].b @ three.modules[name].a, atol=1e-5)


def test_a_directory_is_not_named_like_a_gguf_file(work: Path, run: Run) -> None:
    code, _, err = run(CORRECT.format("adapter", "one.gguf", "a.json") + " --format mlx")
    assert code == 2
    assert "--format mlx writes a directory" in " ".join(err.split())


def test_corrects_an_adapter_of_the_hub(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repo, revision))
        return str(work)

    monkeypatch.setattr("csulora.io.hub.snapshot_download", snapshot_download)
    assert run(CORRECT.format("org/name@v1:adapter", "out", "a.json"))[0] == 0
    assert asked == [("org/name", "v1")]
    stated, plain = json.loads((work / "a.json").read_text()), csulora.load_adapter("adapter")
    assert stated["adapter_sha256"] == plain.sha256
    assert run("inspect org/name@v1:adapter --subspace subspace")[0] == 0


def with_a_head(work: Path, head: torch.Tensor) -> None:
    weights = work / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.lm_head.base_layer.weight": head}, weights)


def test_a_copy_of_the_head_is_left_out_and_told(work: Path, run: Run) -> None:
    with_a_head(work, load_file(work / "aligned" / "model.safetensors")["lm_head.weight"])
    code, out, err = run(CORRECT.format("adapter", "out", "a.json"))
    assert code == 0
    assert "left out, as the aligned checkpoint has them: lm_head (copies)" in out + err
    assert json.loads((work / "a.json").read_text())["copies"] == ["lm_head"]


def test_another_head_is_refused(work: Path, run: Run) -> None:
    with_a_head(work, load_file(work / "base" / "model.safetensors")["lm_head.weight"])
    code, out, err = run(CORRECT.format("adapter", "out", "a.json"))
    assert (code, out) == (exit_codes.REFUSED, "")
    assert "save_embedding_layers=False" in err
    assert not (work / "out").exists()
