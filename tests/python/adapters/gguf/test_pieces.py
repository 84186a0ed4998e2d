"""Qwen3-Next's `in_proj_qkvz`, whose rows llama.cpp's converter spreads over `attn_qkv` and `attn_gate`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

import csulora
import factories
import gguf_files
from csulora.errors import InputError
from csulora.models import gguf_layout, gguf_orders
from csulora.models.checkpoint import Checkpoint
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile
from csulora.models.gguf_layout import Architecture

gguf_zoo = pytest.importorskip("gguf_zoo")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]

MODULE = "model.layers.0.linear_attn.in_proj_qkvz"
QKV, GATE, WHOLE = "blk.0.attn_qkv", "blk.0.attn_gate", "blk.0.ssm_in"
HEIGHTS = {QKV: 64, GATE: 32}
WIDTH = 32

Factors = Sequence[torch.Tensor]  # A and B


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return gguf_zoo.save_gguf("qwen3next", tmp_path / "base.gguf")


def factors(tensor: str, rank: int, seed: int = 0) -> Factors:
    return factories.gaussian(rank, WIDTH, seed=seed), factories.gaussian(HEIGHTS[tensor], rank, seed=seed + 50)


def save(path: Path, alpha: float = 0.0, **pairs: Factors) -> Path:
    """Write a LoRA file with factors (A, B) for tensors of the first layer."""
    tensors = {
        f"blk.0.{name}.weight.{factor}": matrix
        for name, pair in pairs.items()
        for factor, matrix in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    return gguf_files.save_lora(path, tensors, "qwen3next", gguf_files.LORA | {"adapter.lora.alpha": alpha})


def pieces(base: Path, module: csulora.LoraModule) -> dict[str, torch.Tensor]:
    """The update of each tensor, as llama.cpp adds it."""
    model = BaseModel.open(base)
    b, a = model.to_gguf(MODULE, module.b, module.a)
    heights = model.heights(MODULE)
    return dict(zip(heights, (module.scale * b @ a).split_with_sizes([*heights.values()]), strict=True))


def test_pairs_of_one_a_are_one_update_of_their_rank(base: Path, tmp_path: Path) -> None:
    a, of_qkv = factors(QKV, 3)
    _, of_gate = factors(GATE, 3)
    lora = save(tmp_path / "lora.gguf", alpha=6.0, attn_qkv=(a, of_qkv), attn_gate=(a, of_gate))
    read = csulora.load_adapter(lora, base).modules
    assert read.keys() == {MODULE}
    assert torch.equal(read[MODULE].a, a)
    assert read[MODULE].scale == 2.0
    found = pieces(base, read[MODULE])
    torch.testing.assert_close(found, {QKV: 2 * of_qkv @ a, GATE: 2 * of_gate @ a})


def test_pairs_of_different_a_add_their_ranks(base: Path, tmp_path: Path) -> None:
    """llama.cpp divides alpha by each pair's own rank."""
    a, of_qkv = factors(QKV, 3)
    other, of_gate = factors(GATE, 2, seed=1)
    lora = save(tmp_path / "lora.gguf", alpha=6.0, attn_qkv=(a, of_qkv), attn_gate=(other, of_gate))
    (module,) = csulora.load_adapter(lora, base).modules.values()
    assert module.rank == 5
    torch.testing.assert_close(pieces(base, module), {QKV: 2 * of_qkv @ a, GATE: 3 * of_gate @ other})


@pytest.mark.parametrize("alpha", [3e5, 3e-6])
def test_pairs_of_unlike_ranks_keep_half_precision(base: Path, alpha: float, tmp_path: Path) -> None:
    """No scale is folded into a B that cannot hold the product."""
    pairs = {name: [matrix.half() for matrix in factors(name, rank)] for name, rank in ((QKV, 2), (GATE, 4))}
    lora = save(tmp_path / "lora.gguf", alpha, attn_qkv=pairs[QKV], attn_gate=pairs[GATE])
    (module,) = csulora.load_adapter(lora, base).modules.values()
    assert module.b.dtype == torch.float16
    found = pieces(base, replace(module, b=module.b.double(), a=module.a.double()))
    for name, (a, b) in pairs.items():
        expected = alpha / len(a) * b.double() @ a.double()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("tensor", [QKV, GATE])
def test_one_pair_alone_leaves_the_other_rows_as_they_are(base: Path, tensor: str, tmp_path: Path) -> None:
    a, b = factors(tensor, 3)
    lora = save(tmp_path / "lora.gguf", **{tensor.removeprefix("blk.0."): (a, b)})
    (module,) = csulora.load_adapter(lora, base).modules.values()
    expected = {name: b @ a if name == tensor else torch.zeros(HEIGHTS[name], WIDTH) for name in HEIGHTS}
    torch.testing.assert_close(pieces(base, module), expected)


def test_a_file_that_spreads_rows_needs_its_base_model(tmp_path: Path) -> None:
    lora = save(tmp_path / "lora.gguf", attn_gate=factors(GATE, 2))
    with pytest.raises(InputError, match=rf"the order of the rows of {MODULE} .*\(--base-model\)"):
        csulora.load_adapter(lora)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({"attn_gate": factors(QKV, 2)}, r"blk\.0\.attn_gate updates a \[64, 32\] matrix, but it is \[32, 32\]"),
        ({"ssm_in": factors(QKV, 2)}, r"blk\.0\.ssm_in does not exist in .*base\.gguf; the adapter is for another"),
    ],
)
def test_pieces_that_the_model_has_not(base: Path, pairs: dict[str, Factors], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        csulora.load_adapter(save(tmp_path / "lora.gguf", **pairs), base)


@pytest.fixture
def whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as llama.cpp's first converter of it wrote it: one tensor, in Hugging Face's order."""

    def of_2025(config: dict[str, Any], where: str) -> Architecture:
        return replace(gguf_layout.architecture_of_config(config, where), rows={}, spread={})

    with monkeypatch.context() as patched:
        patched.setattr("model_to_gguf.architecture_of_config", of_2025)
        return gguf_zoo.save_gguf("qwen3next", tmp_path / "whole.gguf")


def test_files_of_the_first_converter(base: Path, whole: Path, tmp_path: Path) -> None:
    """The same adapter, read from either file's LoRA, and the same weights."""
    gguf_zoo.make_adapter("qwen3next", tmp_path / "adapter")
    original = csulora.load_adapter(tmp_path / "adapter")
    for model in (base, whole):
        csulora.save_adapter(original, tmp_path / "lora.gguf", base_model=model)
        read = csulora.load_adapter(tmp_path / "lora.gguf", model).modules[MODULE]
        assert torch.equal(read.b, original.modules[MODULE].folded().b)
    names = GGUFFile.map(tmp_path / "lora.gguf").tensors
    assert {"blk.0.ssm_in.weight.lora_a", "blk.0.ssm_in.weight.lora_b"} <= names.keys()
    with pytest.raises(InputError, match=r"blk\.0\.ssm_in does not exist"):
        csulora.load_adapter(tmp_path / "lora.gguf", base)
    weights = [Checkpoint.open(model).load(MODULE)[0] for model in (base, whole)]
    assert torch.equal(*weights)
    assert torch.equal(weights[0], gguf_zoo.model("qwen3next").state_dict()[f"{MODULE}.weight"])


@pytest.mark.llama_cpp
def test_llama_cpp_with_a_file_of_the_first_converter(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    expected = gguf_zoo.logits(gguf_zoo.make_adapter("qwen3next", tmp_path / "adapter"))
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "lora.gguf", base_model=whole)
    assert np.abs(gguf_zoo.llama_logits(whole, tmp_path / "lora.gguf") - expected).max() <= 1e-3


COUNTS = {"qwen3next.ssm.group_count": 2, "qwen3next.ssm.state_size": 8}
Q8_0, Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0


def save_pieces(path: Path, pieces: dict[str, tuple[torch.Tensor, GGMLQuantizationType | None]]) -> Path:
    """Write a model that holds nothing else; None is float32."""
    writer = GGUFWriter(path, "qwen3next")
    gguf_files.add_metadata(writer, COUNTS)
    for name, (matrix, kind) in pieces.items():
        if kind is None:
            writer.add_tensor(f"{name}.weight", matrix.numpy())
        else:
            writer.add_tensor(f"{name}.weight", gguf_files.quantise(matrix, kind), raw_dtype=kind)
    gguf_files.close(writer)
    return path


@pytest.mark.parametrize("kinds", [(Q8_0, Q8_0), (Q8_0, Q4_0), (None, Q4_0), (Q4_0, None)])
def test_pieces_of_two_storage_types_are_one_weight(
    kinds: tuple[GGMLQuantizationType | None, ...], tmp_path: Path
) -> None:
    matrices = [factories.gaussian(rows, WIDTH, seed=rows) for rows in HEIGHTS.values()]
    stored = dict(zip(HEIGHTS, zip(matrices, kinds, strict=True), strict=True))
    checkpoint = Checkpoint.open(save_pieces(tmp_path / "base.gguf", stored))
    assert checkpoint.weights[MODULE].dtype == next(kind.name for kind in kinds if kind)
    loaded, sha256 = checkpoint.load(MODULE)
    expected = [
        matrix if kind is None else torch.from_numpy(quants.dequantize(gguf_files.quantise(matrix, kind), kind))
        for matrix, kind in stored.values()
    ]
    order = gguf_orders.gates_last({"key_heads": 2, "key_size": 8}, len(loaded))
    assert torch.equal(loaded[order], torch.cat(expected))
    for name, (matrix, kind) in stored.items():
        changed = Checkpoint.open(save_pieces(tmp_path / "other.gguf", stored | {name: (2 * matrix, kind)}))
        assert changed.load(MODULE)[1] != sha256

    moved = (loaded[order] - torch.cat(matrices)).double()
    variances = checkpoint.rounding_variances(MODULE)
    assert variances is not None
    edge = variances.margin * (variances.row**0.5 + variances.column**0.5)
    assert 0.3 * edge < torch.linalg.matrix_norm(moved, 2) < edge


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ({QKV: 64}, r"attn_qkv of 64 rows and blk\.0\.attn_gate of 0 rows, and .*qkv of 48 rows and .*gate of 16"),
        ({QKV: 48, GATE: 48}, r"attn_qkv of 48 rows and blk\.0\.attn_gate of 48 rows, and .*qkv of 64 rows and"),
        ({QKV: 64, GATE: 33}, r"97 entries, which are not queries, keys, values and gates of 2 key heads"),
        ({WHOLE: 96, GATE: 32}, r"is spread over blk\.0\.ssm_in of 96 rows, and blk\.0\.ssm_in of 128 rows are needed"),
    ],
)
def test_a_damaged_model_is_an_error(pieces: dict[str, int], expected: str, tmp_path: Path) -> None:
    matrices = {name: (torch.zeros(rows, WIDTH), None) for name, rows in pieces.items()}
    with pytest.raises(InputError, match=expected):
        BaseModel.open(save_pieces(tmp_path / "base.gguf", matrices))


@pytest.mark.parametrize("widths", [(32, 24), (24, 32)])
def test_a_model_whose_pieces_have_unlike_widths_is_an_error(widths: tuple[int, int], tmp_path: Path) -> None:
    matrices = {
        name: (torch.zeros(rows, width), None) for (name, rows), width in zip(HEIGHTS.items(), widths, strict=True)
    }
    with pytest.raises(InputError, match=r"attn_gate hold rows of .*in_proj_qkvz, and theirs have unlike lengths"):
        BaseModel.open(save_pieces(tmp_path / "base.gguf", matrices))
