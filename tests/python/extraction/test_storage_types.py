"""Model pairs whose checkpoints differ in how they are stored, with the float64 truth known."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

import csulora
import factories
import gguf_files
import quantised
from csulora.errors import RefusedError
from csulora.extraction.model_pair import ModelPair

pytestmark = pytest.mark.usefixtures("one_thread")

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SIZE, RANK = 192, 4
STORED = ["bfloat16", *quantised.KINDS]


def save(directory: Path, weights: dict[str, Tensor], stored: str) -> Path:
    if stored in quantised.KINDS:
        return quantised.save(directory, weights, quantised.KINDS[stored])
    return factories.save_checkpoint(directory, {name: weight.bfloat16() for name, weight in weights.items()})


def truth() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights before and after an alignment along four strong directions."""
    shapes = {Q: (SIZE, SIZE), DOWN: (SIZE, 2 * SIZE)}
    base = {f"{name}.weight": factories.gaussian(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    base[f"{DOWN}.weight"][::30] *= 5  # rows whose rounding is coarser
    aligned = {}
    for name, weight in base.items():
        direction = factories.with_spectrum(*weight.shape, torch.tensor([40.0, 36, 32, 28]).double(), seed=7)
        aligned[name] = weight + direction.float()
    return base, aligned


@pytest.mark.parametrize("before", STORED)
@pytest.mark.parametrize("after", STORED)
def test_the_noise_edge_lies_above_the_rounding_and_what_stands_out_is_true(
    tmp_path: Path, before: str, after: str
) -> None:
    base, aligned = truth()
    models = save(tmp_path / "base", base, before), save(tmp_path / "aligned", aligned, after)
    subspace = csulora.extract(*models, rank=16)
    batches = ModelPair.open(*models).load_ahead(list(subspace), None)
    loaded = {module.name: module.task for batch in batches for module in batch}
    for name, module in subspace.items():
        displacement = (aligned[f"{name}.weight"] - base[f"{name}.weight"]).double()
        stored = loaded[name].aligned.double() - loaded[name].base.double()
        rounding = float(torch.linalg.matrix_norm(stored - displacement, 2))
        assert rounding <= module.certificate.noise_edge <= 4 * rounding
        assert 0 < module.rank <= RANK
        true = torch.linalg.svd(displacement).U[:, :RANK]
        overlap = float((true.t() @ module.u.double()).square().sum()) / module.rank
        assert overlap > 0.85
    for result in csulora.verify(subspace, *models):
        assert result.same_weights
        assert result.measured.noise_edge == result.stored.noise_edge


@pytest.mark.parametrize("after", quantised.KINDS)
@pytest.mark.parametrize("shape", ["even", "large rows", "large columns", "heavy tails"])
def test_what_was_only_quantised_is_not_taken_for_alignment(tmp_path: Path, after: str, shape: str) -> None:
    weight = factories.gaussian(SIZE, 2 * SIZE, seed=3)
    if shape == "large rows":
        weight[::30] *= 8
    if shape == "large columns":
        weight[:, ::100] *= 8
    if shape == "heavy tails":
        weight *= factories.gaussian(SIZE, 2 * SIZE, seed=4).square()
    weights = {f"{Q}.weight": weight.bfloat16()}
    models = save(tmp_path / "base", weights, "bfloat16"), save(tmp_path / "aligned", weights, after)
    with pytest.raises(RefusedError, match="differ by no more than storage rounding"):
        csulora.extract(*models)


def test_a_partial_run_continues_over_a_quantised_pair_to_the_same_bytes(tmp_path: Path) -> None:
    base, aligned = truth()
    models = save(tmp_path / "base", base, "bfloat16"), save(tmp_path / "aligned", aligned, "blocks")
    one, other = (tmp_path / f"{name}.safetensors" for name in ("one", "other"))
    csulora.extract(*models, output=one, rank=4)
    csulora.extract(*models, output=other, rank=4)
    assert one.read_bytes() == other.read_bytes()


def test_the_scales_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    base, aligned = truth()
    kind = quantised.KINDS["channels"]
    models = save(tmp_path / "base", base, "bfloat16"), save(tmp_path / "aligned", aligned, "channels")
    tensors, _ = quantised.quantise(aligned, kind)
    tensors[f"{Q}.weight_scale"] *= 1.5
    other = factories.save_checkpoint(tmp_path / "other", tensors, {"quantization_config": kind.settings})
    results = {result.module: result for result in csulora.verify(csulora.extract(*models, rank=4), models[0], other)}
    assert (results[Q].same_weights, results[DOWN].same_weights) == (False, True)
    assert not results[Q].holds


def test_an_fp8_base_goes_with_a_gguf_file(tmp_path: Path) -> None:
    weights = factories.llama_weights(layers=1)
    aligned = factories.moved(weights, size=2.0)
    base = quantised.save(tmp_path / "base", weights, quantised.KINDS["channels"])
    file = gguf_files.save_model(tmp_path / "aligned.gguf", aligned, GGMLQuantizationType.F16)
    found = csulora.extract(base, file, rank=4, modules=["q_proj"])[Q]
    displacement = (aligned[f"{Q}.weight"] - weights[f"{Q}.weight"]).double()
    true = torch.linalg.svd(displacement).U[:, : found.rank]
    assert float((true.t() @ found.u.double()).square().sum()) / found.rank > 0.9
