"""Experts in GGUF models as checkpoints: what directories of the same models give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

import csulora
import gguf_files
from csulora.models import gguf_quants
from csulora.models.checkpoint import Checkpoint
from csulora.models.names import is_expert
from csulora.models.resolver import Resolver

gguf_zoo = pytest.importorskip("gguf_zoo")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WITH_EXPERTS = [name for name, family in gguf_zoo.FAMILIES.items() if family.parameters]


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_a_pair_of_files_gives_the_subspaces_of_directories(family: str, tmp_path: Path) -> None:
    models = {"base": gguf_zoo.model(family), "aligned": gguf_zoo.moved(family)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        gguf_zoo.convert(model, tmp_path / f"{name}.gguf", name)
    expected = csulora.extract(tmp_path / "base", tmp_path / "aligned", rank=4)
    subspace = csulora.extract(tmp_path / "base.gguf", tmp_path / "aligned.gguf", rank=4)
    directories = Resolver(expected, names=expected.names)
    experts = [module for module in subspace if is_expert(module)]
    assert len(experts) == sum(map(is_expert, expected)) > 0
    for module in experts:
        other = expected[directories.name_of(module)]
        for factor in ("u", "s", "v"):
            assert torch.equal(getattr(subspace[module], factor), getattr(other, factor))
    ours, theirs = subspace.provenance.experts, expected.provenance.experts
    assert ours is not None
    assert theirs is not None
    assert (ours.interleaved, ours.exchanged) == (theirs.interleaved, theirs.exchanged)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
@pytest.mark.parametrize("fused", [False, True])
def test_quantised_experts_are_read_one_by_one(kind: GGMLQuantizationType, fused: bool, tmp_path: Path) -> None:
    experts = np.random.default_rng(0).standard_normal((3, 32, 64), dtype=np.float32)
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    stored = quants.quantize(experts, kind)
    writer.add_tensor(f"blk.0.ffn_{'gate_up' if fused else 'up'}_exps.weight", stored, raw_dtype=kind)
    gguf_files.close(writer)
    checkpoint, values = Checkpoint.open(tmp_path / "model.gguf"), quants.dequantize(stored, kind)
    assert len(checkpoint.weights) == (6 if fused else 3)
    for expert in range(3):
        selected = slice(16 if fused else 0, None)
        rows, data = values[expert, selected], memoryview(stored[expert, selected].tobytes())
        module = f"model.layers.0.mlp.experts.{expert}.up_proj"
        weight, _ = checkpoint.load(module)
        assert np.array_equal(weight.numpy(), rows)
        assert checkpoint.rounding_variances(module) == gguf_quants.rounding_variances(data, rows.shape, kind)
