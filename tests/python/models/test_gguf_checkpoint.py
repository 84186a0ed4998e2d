"""GGUF files as checkpoints: the subspaces of Hugging Face directories, and a noise edge for quantised ones."""

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

import csulora
import factories
import gguf_files
from csulora.errors import InputError, RefusedError
from csulora.extraction.model_pair import ModelPair
from csulora.extraction.noise_edge import quantised_edge
from csulora.models import gguf_codes, scaled_codes
from csulora.models.checkpoint import Checkpoint

Q = "model.layers.0.self_attn.q_proj"
KINDS = [GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]
K_KINDS = [GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "NVFP4")]

WIDTH, HIDDEN = 128, 256


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return factories.llama_weights(layers=1, width=WIDTH, hidden=HIDDEN, dtype=dtype)


def gguf_model_pair(tmp_path: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    base = weights(dtype)
    return (
        gguf_files.save_model(tmp_path / "base.gguf", base),
        gguf_files.save_model(tmp_path / "aligned.gguf", factories.moved(base)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_subspaces_are_the_same_whatever_the_format(dtype: torch.dtype, tmp_path: Path) -> None:
    base = weights(dtype)
    directories = (
        factories.save_checkpoint(tmp_path / "base", base),
        factories.save_checkpoint(tmp_path / "aligned", factories.moved(base)),
    )
    expected, subspace = (
        csulora.extract(*directories, rank=8),
        csulora.extract(*gguf_model_pair(tmp_path, dtype), rank=8),
    )
    assert list(subspace) == list(expected)
    for name, module in subspace.items():
        for factor in ("u", "s", "v"):
            assert torch.equal(getattr(module, factor), getattr(expected[name], factor))
        assert module.certificate == expected[name].certificate
    assert subspace.fingerprints == expected.fingerprints
    assert all(result.holds for result in csulora.verify(expected, *gguf_model_pair(tmp_path, dtype)))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_directory_and_a_file_make_a_pair(model_type: str, tmp_path: Path) -> None:
    base = factories.save_checkpoint(tmp_path / "base", weights(), {"model_type": model_type})
    subspace = csulora.extract(base, gguf_model_pair(tmp_path, torch.float32)[1], rank=8)
    assert subspace[Q].certificate.captured_energy > 0.9


def test_a_pair_has_one_architecture(tmp_path: Path) -> None:
    base = factories.save_checkpoint(tmp_path / "base", weights(), {"model_type": "qwen2"})
    with pytest.raises(InputError, match=r"architecture is qwen2 in base base and llama in aligned aligned\.gguf"):
        csulora.extract(base, gguf_model_pair(tmp_path, torch.float32)[1], rank=8)


def test_modules_outside_layers(tmp_path: Path) -> None:
    subspace = csulora.extract(*gguf_model_pair(tmp_path, torch.float32), rank=4, modules=["lm_head", "embed_tokens"])
    assert list(subspace) == ["lm_head", "model.embed_tokens"]


def test_a_tied_head_is_an_alias(tmp_path: Path) -> None:
    tied = weights()
    del tied["lm_head.weight"]
    checkpoint = Checkpoint.open(gguf_files.save_model(tmp_path / "tied.gguf", tied))
    assert checkpoint.aliases == {"lm_head": "model.embed_tokens"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_loads_quantised_weights(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(gguf_files.save_model(tmp_path / "m.gguf", weights(), kind))
    for module in (Q, "model.layers.0.mlp.down_proj"):
        matrix, _ = checkpoint.load(module)
        original = weights()[f"{module}.weight"]
        assert checkpoint.weights[module].dtype == kind.name
        assert matrix.shape == original.shape
        assert (matrix - original).norm() <= 0.15 * original.norm()


PAIRS = [(one, other) for i, one in enumerate(KINDS) for other in KINDS[i + 1 :]]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda kind: kind.name)
def test_two_roundings_of_one_model_are_refused(
    one: GGMLQuantizationType, other: GGMLQuantizationType, tmp_path: Path
) -> None:
    base = gguf_files.save_model(tmp_path / "one.gguf", weights(), one)
    aligned = gguf_files.save_model(tmp_path / "other.gguf", weights(), other)
    with pytest.raises(RefusedError, match=r"one\.gguf and other\.gguf differ by no more than storage rounding"):
        csulora.extract(base, aligned, rank=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_model_and_its_rounding_are_refused(kind: GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path) -> None:
    base = gguf_files.save_model(tmp_path / "base.gguf", weights(dtype))
    aligned = gguf_files.save_model(tmp_path / "aligned.gguf", weights(), kind)
    with pytest.raises(RefusedError, match="no more than storage rounding"):
        csulora.extract(base, aligned, rank=16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_quantised_pair_that_differs_keeps_what_stands_out(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    base = weights()
    moved = factories.moved(base, size=1.0, rank=3)
    subspace = csulora.extract(
        gguf_files.save_model(tmp_path / "base.gguf", base, kind),
        gguf_files.save_model(tmp_path / "aligned.gguf", moved, kind),
        rank=16,
    )
    for name, module in subspace.items():
        true = torch.linalg.svdvals(moved[f"{name}.weight"] - base[f"{name}.weight"])
        assert module.certificate.above_noise == module.rank
        assert module.rank >= int((true > 2 * module.certificate.noise_edge).sum())
        assert module.rank <= int((true > module.certificate.noise_edge / 2).sum())
    assert {module.rank for module in subspace.values()} == {3}


def ggml_quantise(matrix: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Quantise with the library that llama.cpp quantises with; gguf has no quantiser for these types."""
    library = next(Path(pytest.importorskip("llama_cpp").__file__).parent.glob("lib/libggml-base.*"))
    quantise = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    source, (rows, columns) = matrix.contiguous().numpy(), matrix.shape
    block, size = GGML_QUANT_SIZES[kind]
    blocks = np.empty((rows, columns // block * size), np.uint8)
    quantise(kind, source.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    return blocks


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", K_KINDS, ids=lambda kind: kind.name)
def test_k_quants(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """A model and its rounding are refused, and so are two roundings; what differs more keeps what stands out."""
    base = factories.llama_weights(layers=1, width=256, hidden=256)
    moved = factories.moved(base, size=2.0, rank=3)
    full, rounded, eight, aligned = (tmp_path / f"{name}.gguf" for name in ("full", "rounded", "eight", "aligned"))
    gguf_files.save_model(full, base)
    gguf_files.save_model(eight, base, GGMLQuantizationType.Q8_0)
    gguf_files.save_model(rounded, base, kind, quantise=ggml_quantise)
    gguf_files.save_model(aligned, moved, kind, quantise=ggml_quantise)
    for other in (full, eight):
        with pytest.raises(RefusedError, match="no more than storage rounding"):
            csulora.extract(other, rounded, rank=16)
    assert {module.rank for module in csulora.extract(rounded, aligned, rank=16).values()} == {3}


def nvfp4(matrix: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Random codes; scales of 1, which is 0x38."""
    rows, columns = matrix.shape
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // 64, 36), np.uint8)
    blocks[..., :4] = 0x38
    return blocks.reshape(rows, -1)


def test_codes_times_scales_are_the_values_that_gguf_reads() -> None:
    for kind in gguf_codes.FORMATS:
        blocks = np.random.default_rng(1).integers(0, 128, (64, 2 * GGML_QUANT_SIZES[kind][1]), np.uint8)
        codes, scales = gguf_codes.unpack(blocks, kind)
        found = scaled_codes.dequantise(codes, scales, *gguf_codes.FORMATS[kind])
        assert torch.equal(found, torch.from_numpy(quants.dequantize(blocks, kind)))


def test_a_scale_of_a_whole_nvfp4_matrix_is_part_of_it(tmp_path: Path) -> None:
    kind, scale = GGMLQuantizationType.NVFP4, {"blk.0.attn_q.scale": torch.tensor([0.25])}
    plain, scaled = (
        Checkpoint.open(gguf_files.save_model(tmp_path / f"{i}.gguf", weights(), kind, quantise=nvfp4, further=further))
        for i, further in enumerate(({}, scale))
    )
    (matrix, content), (quarter, other) = plain.load(Q), scaled.load(Q)
    assert torch.equal(quarter, matrix / 4)
    assert content != other
    assert quantised_edge(scaled.rounding_variances(Q)) == pytest.approx(
        quantised_edge(plain.rounding_variances(Q)) / 4
    )

    for i, wrong in enumerate((torch.ones(2), torch.ones(1).half(), torch.tensor([math.nan]))):
        further = {"blk.0.attn_q.scale": wrong}
        path = gguf_files.save_model(tmp_path / f"w{i}.gguf", weights(), kind, quantise=nvfp4, further=further)
        with pytest.raises(InputError, match=r"blk\.0\.attn_q\.scale (is F|holds a scale that is no number)"):
            Checkpoint.open(path).load(Q)


def test_the_edge_is_the_sum_of_both_files(tmp_path: Path) -> None:
    eight, half = GGMLQuantizationType.Q8_0, torch.float16
    quantised = gguf_files.save_model(tmp_path / "q.gguf", weights(), eight)
    edges = {}
    for name, base in (
        ("quantised", quantised),
        ("half", gguf_files.save_model(tmp_path / "h.gguf", weights(half))),
        ("full", gguf_files.save_model(tmp_path / "f.gguf", weights())),
    ):
        ((loaded,),) = ModelPair.open(base, quantised, modules=[Q]).load_ahead([Q], None)
        edges[name] = loaded.task.noise_std * 2 * math.sqrt(WIDTH)
    alone = quantised_edge(Checkpoint.open(quantised).rounding_variances(Q))
    assert edges["quantised"] == pytest.approx(2 * alone)
    assert edges["full"] == pytest.approx(alone, rel=1e-3)
    assert 1.01 * alone < edges["half"] < 1.5 * alone


def test_hashes_of_quantised_weights_tell_them_apart(tmp_path: Path) -> None:
    one, two = (
        gguf_files.save_model(tmp_path / f"{i}.gguf", w, KINDS[0])
        for i, w in enumerate((weights(), factories.moved(weights())))
    )
    subspace = csulora.extract(one, two, rank=4, keep_noise=True)
    assert all(result.holds for result in csulora.verify(subspace, one, two))
    assert not any(result.same_weights for result in csulora.verify(subspace, two, one))


def test_weights_rounded_by_importance_are_refused(tmp_path: Path) -> None:
    base = gguf_files.save_model(tmp_path / "base.gguf", weights())
    importance = {"quantize.imatrix.file": "imatrix.dat"}
    four = gguf_files.save_model(tmp_path / "4.gguf", weights(), KINDS[0], metadata=importance)
    with pytest.raises(RefusedError, match=r"blk\.0\..*weight was quantised with an importance matrix.*Q8_0"):
        csulora.extract(base, four)
    moved = factories.moved(weights(), size=1.0)
    eight = gguf_files.save_model(tmp_path / "8.gguf", moved, GGMLQuantizationType.Q8_0, metadata=importance)
    assert csulora.extract(base, eight, rank=2)[Q].rank == 2


@pytest.mark.parametrize("kind", [GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0])
def test_types_without_a_spacing_are_refused(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    base = gguf_files.save_model(tmp_path / "base.gguf", weights())
    other = gguf_files.save_model(tmp_path / "t.gguf", {f"{Q}.weight": torch.ones(256, 256)}, kind)
    with pytest.raises(
        InputError, match=rf"t\.gguf: tensor .*q_proj\.weight is {kind.name}, which csulora does not read"
    ):
        csulora.extract(base, other, modules=["q_proj"])
