"""Pairs that differ in storage type, and quantised ones that are refused, as somebody at a terminal meets them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import csulora
import factories
import quantised
from csulora.cli import app as cli

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., int]

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with one pair in bfloat16 and copies of it in FP8, and an adapter."""
    monkeypatch.chdir(tmp_path)
    base = factories.llama_weights(layers=1, dtype=torch.bfloat16)
    for name, weights in (("base", base), ("aligned", factories.moved(base, size=2.0))):
        factories.save_checkpoint(tmp_path / name, weights)
        for kind in ("blocks", "one scale", "channels"):
            quantised.save(tmp_path / f"{name} {kind}", weights, quantised.KINDS[kind])
    factories.save_adapter(tmp_path / "adapter", {Q: (48, 48)})
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["csulora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0)

    return run


@pytest.mark.parametrize(
    ("base", "aligned"),
    [
        ("base", "aligned blocks"),
        ("base", "aligned one scale"),  # as Ministral 3
        ("base channels", "aligned"),
        ("base blocks", "aligned blocks"),
        ("base channels", "aligned blocks"),
    ],
)
def test_a_pair_with_fp8_goes_all_the_way(work: Path, run: Run, base: str, aligned: str) -> None:
    assert run("extract", base, aligned, "-o", "subspace", "--rank", 4, "--json", "extraction.json") == 0
    assert run("verify", "subspace", base, aligned) == 0
    assert run("correct", "adapter", "--subspace", "subspace", "--policy", "project", "-o", "fixed") == 0
    extracted = json.loads((work / "extraction.json").read_text())
    assert extracted["left_out"] == {"embedding": ["model.embed_tokens"], "head": ["lm_head"]}
    (found,) = csulora.extract(base, aligned, rank=4, modules=[Q]).values()
    assert torch.equal(csulora.Subspace.open("subspace")[Q].u, found.u)
    exact = csulora.extract("base", "aligned", rank=4, modules=[Q])[Q]
    overlap = (exact.u.float().t() @ found.u.float()).square().sum() / found.rank
    assert overlap > 0.95


def test_the_way_out_of_a_quantised_pair_works(work: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    tensors = {f"{Q}.{name}": torch.zeros(4, 4, dtype=torch.int32) for name in ("qweight", "qzeros", "scales")}
    factories.save_checkpoint(work / "awq", tensors, config)
    assert run("extract", "base", "awq", "-o", "subspace") == 4
    assert "awq: is quantised with AWQ, which csulora does not read; name the unquantised" in capsys.readouterr().err
    assert not (work / "subspace").exists()
    assert run("extract", "base", "aligned", "-o", "subspace", "--rank", 4) == 0
    factories.save_adapter(work / "for awq", {Q: (48, 48)}, base_model_name_or_path="awq")
    assert run("correct", "for awq", "--subspace", "subspace", "--policy", "project", "-o", "fixed") == 0
