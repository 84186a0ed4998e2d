import hashlib
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import factories
import quantised
from csulora.errors import InputError
from csulora.models import scaled_codes
from csulora.models.checkpoint import Checkpoint
from csulora.models.comparison import check_comparable
from csulora.models.shards import StoredTensor
from csulora.models.storage import Contents
from csulora.subspace.expert_layout import ExpertLayout

Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = factories.llama_weights(layers=1, width=64, hidden=96)
E4M3 = torch.float8_e4m3fn


def stored(directory: Path, tensors: dict[str, Tensor], **settings: object) -> Checkpoint:
    config = {"quantization_config": settings} if settings else {}
    return Checkpoint.open(factories.save_checkpoint(directory, tensors, config))


def codes(rows: int = 64, columns: int = 96, seed: int = 0) -> Tensor:
    return factories.gaussian(rows, columns, seed=seed).to(E4M3)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_gives_the_values_that_are_stored(tmp_path: Path, kind: str) -> None:
    tensors, values = quantised.quantise(WEIGHTS, quantised.KINDS[kind])
    checkpoint = Checkpoint.open(quantised.save(tmp_path / "model", WEIGHTS, quantised.KINDS[kind]))
    matrices = {name.removesuffix(".weight"): value for name, value in values.items() if value.dim() == 2}
    assert sorted(checkpoint.weights) == sorted(matrices)
    for module, value in matrices.items():
        loaded, digest = checkpoint.load(module)
        assert loaded.shape == checkpoint.weights[module].shape
        torch.testing.assert_close(loaded.double(), value, rtol=1e-6, atol=0)
        parts = [tensor for name, tensor in tensors.items() if name.startswith(f"{module}.weight")]
        stored_bytes = b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)
        assert digest == hashlib.sha256(stored_bytes).hexdigest()


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_scales_may_lie_in_another_shard(tmp_path: Path, kind: str) -> None:
    tensors, values = quantised.quantise(WEIGHTS, quantised.KINDS[kind])
    config = {"quantization_config": quantised.KINDS[kind].settings}
    checkpoint = Checkpoint.open(factories.save_checkpoint(tmp_path / "model", tensors, config, shards=5))
    torch.testing.assert_close(checkpoint.load(Q)[0].double(), values[f"{Q}.weight"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_scales_are_neither_modules_nor_left_out(tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint.open(quantised.save(tmp_path / "model", WEIGHTS, quantised.KINDS[kind]))
    assert len(checkpoint.select([])) == 7
    assert checkpoint.left_out(checkpoint.select([])) == {"embedding": ["model.embed_tokens"], "head": ["lm_head"]}


def test_stacked_experts_of_gpt_oss_are_left_out_once(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = {f"{experts}_blocks": torch.zeros(2, 8, 3, 16, dtype=torch.uint8)}
    scales = {f"{experts}_scales": torch.zeros(2, 8, 3, dtype=torch.uint8)}
    checkpoint = stored(tmp_path / "model", blocks | scales | {f"{Q}.weight": torch.ones(4, 4)}, quant_method="mxfp4")
    assert checkpoint.left_out([Q]) == {"stacked": [experts]}
    with pytest.raises(InputError, match=rf"{experts} is \[2, 8, 96\], and only matrices"):
        checkpoint.select(["experts.*"])


@pytest.mark.parametrize("leading", [(3,), (2, 4)])
def test_mxfp4_is_what_transformers_makes_of_it(leading: tuple[int, ...]) -> None:
    generator = factories.generator(0)
    blocks = torch.randint(256, (*leading, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (*leading, 5), generator=generator, dtype=torch.uint8)
    values = scaled_codes.dequantise_mxfp4(blocks, scales)
    assert torch.equal(values.double(), quantised.mxfp4_values(blocks, scales))
    stacked = [part.reshape(-1, leading[-1], *part.shape[len(leading) :]) for part in (blocks, scales)]
    theirs = convert_moe_packed_tensors(*stacked, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(values, theirs.reshape(values.shape))


def test_fp8_is_what_transformers_makes_of_it() -> None:
    matrix, scales = quantised.fp8(factories.gaussian(64, 96, seed=0), (32, 32))
    theirs = Fp8Dequantize(None)._dequantize_one(matrix, scales)
    ours = scaled_codes.dequantise(matrix.view(torch.uint8), scales, (32, 32), scaled_codes.FP8)
    assert torch.equal(ours, theirs)


def test_every_code_of_fp8_has_the_level_that_its_bits_say() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).reshape(2, 128)
    ours = scaled_codes.dequantise(every.view(torch.uint8), torch.ones(1, 1), (2, 128), scaled_codes.FP8)
    expected = quantised.fp8_values(every, torch.ones(1, 1), (2, 128))
    assert torch.equal(ours[:, :127].double(), expected[:, :127])
    assert ours[:, 127].isnan().all()


def test_chunks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, scales = quantised.fp8(factories.gaussian(50, 70, seed=0), (16, 32))
    arguments = (matrix.view(torch.uint8), scales, (16, 32), scaled_codes.FP8)
    whole, variances = scaled_codes.dequantise(*arguments), scaled_codes.rounding_variances(*arguments)
    monkeypatch.setattr(scaled_codes, "_CHUNK_ENTRIES", 7 * 70)
    assert torch.equal(scaled_codes.dequantise(*arguments), whole)
    assert scaled_codes.rounding_variances(*arguments) == pytest.approx(variances)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), block=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_blocks_of_any_size_are_spread_over_their_entries(rows: int, columns: int, block: tuple[int, int]) -> None:
    matrix, scales = quantised.fp8(factories.gaussian(rows, columns, seed=rows), block)
    ours = scaled_codes.dequantise(matrix.view(torch.uint8), scales, block, scaled_codes.FP8)
    torch.testing.assert_close(ours.double(), quantised.fp8_values(matrix, scales, block), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_be_of_any_floating_point_type_or_exponents(tmp_path: Path, dtype: torch.dtype) -> None:
    scale = torch.tensor([[129]], dtype=torch.uint8) if dtype == torch.uint8 else torch.tensor([[4.0]]).to(dtype)
    checkpoint = stored(tmp_path / "model", {f"{Q}.weight": codes(), f"{Q}.weight_scale": scale})
    assert torch.equal(checkpoint.load(Q)[0], 4 * codes().float())


SCALE, INVERSE = f"{Q}.weight_scale", f"{Q}.weight_scale_inv"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32]}


@pytest.mark.parametrize(
    ("scales", "settings", "message"),
    [
        ({}, {}, rf"{Q}\.weight is quantised and has no .*weight_scale_inv or .*weight_scale;"),
        ({SCALE: torch.ones(1), INVERSE: torch.ones(1)}, {}, r"has both .* and .*; one tensor of scales"),
        (
            {INVERSE: torch.ones(3, 2)},
            BLOCKS,
            r"weight_scale_inv is \[3, 2\], .* be \[2, 3\] for a weight of \[64, 96\]",
        ),
        ({INVERSE: torch.ones(1)}, BLOCKS, r"weight_scale_inv is \[1\], .* be \[2, 3\]"),
        ({INVERSE: torch.ones(2, 3, 1)}, BLOCKS, r"weight_scale_inv is \[2, 3, 1\]"),
        ({INVERSE: torch.ones(2, 3)}, {"quant_method": "fp8"}, r"by config\.json it must be \[1, 1\] or \[64, 1\]"),
        ({SCALE: torch.ones(96)}, {}, r"weight_scale is \[96\], .* be \[1, 1\] or \[64, 1\]"),
        ({SCALE: torch.ones(1, dtype=torch.int32)}, {}, r"weight_scale is I32; scales must be"),
        ({SCALE: torch.ones(1), f"{Q}.weight_zero_point": torch.ones(1)}, {}, r"has zero points; csulora reads symm"),
        (
            {INVERSE: torch.ones(1)},
            {"quant_method": "fp8", "weight_block_size": [0, 1]},
            r"weight_block_size is \[0, 1",
        ),
        (
            {INVERSE: torch.ones(1)},
            {"quant_method": "fp8", "weight_block_size": 128},
            r"weight_block_size is 128; it m",
        ),
    ],
)
def test_refuses_scales_that_do_not_fit(
    tmp_path: Path, scales: dict[str, Tensor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        stored(tmp_path / "model", {f"{Q}.weight": codes(), **scales}, **settings)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", ["blocks", "channels"])
def test_refuses_scales_that_are_no_positive_numbers(tmp_path: Path, kind: str, scale: float) -> None:
    tensors, _ = quantised.quantise(WEIGHTS, quantised.KINDS[kind])
    name = next(name for name in tensors if name.startswith(f"{Q}.weight_scale"))
    tensors[name][-1, -1] = scale
    checkpoint = stored(tmp_path / "model", tensors, **quantised.KINDS[kind].settings)
    with pytest.raises(InputError, match=rf"model\.safetensors: {name} holds a scale that is not a positive number"):
        checkpoint.load(Q)


def test_refuses_an_exponent_of_mxfp4_that_is_not_a_number(tmp_path: Path) -> None:
    tensors, _ = quantised.quantise(WEIGHTS, quantised.KINDS["MXFP4"])
    tensors[f"{Q}.weight_scales"][3, 1] = 255
    checkpoint = stored(tmp_path / "model", tensors, quant_method="mxfp4")
    with pytest.raises(InputError, match=rf"{Q}\.weight_scales holds a scale that is not"):
        checkpoint.load(Q)


@pytest.mark.parametrize(("code", "scale"), [(0x7F, 1.0), (0xFF, 1.0), (0x7E, 1e37)])
def test_refuses_entries_that_are_not_finite(tmp_path: Path, code: int, scale: float) -> None:
    matrix = codes()
    matrix.view(torch.uint8)[5, 7] = code
    checkpoint = stored(tmp_path / "model", {f"{Q}.weight": matrix, SCALE: torch.tensor(scale)})
    with pytest.raises(InputError, match=rf"model\.safetensors: {Q}\.weight holds NaN or a number beyond"):
        checkpoint.load(Q)


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4-bit\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes \(8-bit\)"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        (COMPRESSED | {"format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, r"compressed-tensors \(nvfp4-pack-quantized\)"),
        (COMPRESSED | {"format": "int-quantized"}, r"compressed-tensors \(int-quantized\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"bits": 4}, "None"),
    ],
)
def test_refuses_other_methods_by_their_names(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"is quantised with {name}, which csulora does not read; name the unquant"):
        stored(tmp_path / "model", {f"{Q}.weight": torch.ones(4, 4)}, **settings)


@pytest.mark.parametrize(
    ("suffixes", "name"),
    [
        ([".qweight", ".qzeros", ".scales", ".g_idx"], "GPTQ"),
        ([".qweight", ".qzeros", ".scales"], "GPTQ or AWQ"),
        ([".weight_packed", ".weight_scale", ".weight_shape"], r"compressed-tensors \(packed\)"),
        ([".weight_packed", ".weight_scale", ".weight_global_scale"], "NVFP4"),
        ([".compressed", ".bitmask", ".shape"], r"compressed-tensors \(sparse\)"),
        ([".weight", ".weight_scale", ".weight_scale_2"], "NVFP4"),
        ([".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        ([".weight", ".SCB", ".weight_format"], "bitsandbytes"),
    ],
)
def test_knows_other_methods_by_their_tensors(tmp_path: Path, suffixes: list[str], name: str) -> None:
    tensors = {f"{Q}{suffix}": torch.zeros(4, 4, dtype=torch.uint8) for suffix in suffixes}
    with pytest.raises(InputError, match=f"is quantised with {name}"):
        stored(tmp_path / "model", tensors)


def test_the_settings_may_be_those_of_the_language_model_within(tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    with pytest.raises(InputError, match="is quantised with AWQ"):
        Checkpoint.open(factories.save_checkpoint(tmp_path / "model", WEIGHTS, config))
    with pytest.raises(InputError, match=r"config\.json: quantization_config is 'awq'; it must be an object"):
        Checkpoint.open(factories.save_checkpoint(tmp_path / "other", WEIGHTS, {"quantization_config": "awq"}))


def test_a_matrix_of_integers_is_refused_where_it_is_compared(tmp_path: Path) -> None:
    base, aligned = (
        stored(tmp_path / name, {f"{Q}.weight": torch.ones(4, 4).to(dtype)})
        for name, dtype in (("base", torch.float32), ("aligned", torch.int8))
    )
    with pytest.raises(InputError, match=rf"aligned: tensor {Q}\.weight is I8, which csulora does not read; name the"):
        check_comparable(base, aligned, {Q: Q})


def test_a_weight_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    tensors, _ = quantised.quantise(WEIGHTS, quantised.KINDS["MXFP4"])
    with pytest.raises(InputError, match=rf"{Q}\.weight\S* is a weight that another tensor holds as well"):
        stored(tmp_path / "model", tensors | {f"{Q}.weight": torch.ones(64, 64)}, quant_method="mxfp4")


VALUES = (
    st.none() | st.booleans() | st.integers(-3, 200) | st.text(max_size=3) | st.lists(st.integers(-1, 64), max_size=3)
)
GROUPS = st.dictionaries(
    st.sampled_from(["a", "b"]),
    VALUES
    | st.fixed_dictionaries(
        {
            "weights": VALUES
            | st.dictionaries(
                st.sampled_from(["strategy", "group_size", "block_structure"]),
                VALUES | st.sampled_from(["group", "block"]),
            )
        }
    ),
    max_size=2,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["fp8", "compressed-tensors", "modelopt", "mxfp4"]) | VALUES,
        "weight_block_size": VALUES,
        "format": st.just("float-quantized") | VALUES,
        "quant_algo": st.just("FP8") | VALUES,
        "config_groups": GROUPS | VALUES,
    },
)


@given(settings=SETTINGS, grid=st.lists(st.integers(1, 70), max_size=3))
def test_whatever_a_configuration_says_the_blocks_cover_the_matrix_or_it_is_refused(
    settings: dict[str, Any], grid: list[int]
) -> None:
    tensors = {
        f"{Q}.weight": StoredTensor(Path("file"), [64, 96], "F8_E4M3"),
        SCALE: StoredTensor(Path("file"), grid, "F32"),
    }
    with suppress(InputError):
        scales = Contents.of(tensors, {"quantization_config": settings}, Path(), ExpertLayout()).weights[Q].scales
        assert scales is not None
        assert scales.grid == (math.ceil(64 / scales.block[0]), math.ceil(96 / scales.block[1]))
        assert math.prod(grid) == math.prod(scales.grid)
