import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

import factories
import oracle
import quantised
from csulora.extraction.noise_edge import floating_point_edge, noise_std, quantised_edge
from csulora.models import gguf_codes, gguf_quants, scaled_codes
from csulora.models.rounding import RoundingVariances

KINDS = [GGMLQuantizationType[name] for name in gguf_quants.QUANTISED]
WRITTEN = [kind for kind in KINDS if not kind.name.endswith("_K") and kind.name != "NVFP4"]  # gguf cannot write others
ROUNDED = [kind for kind in WRITTEN if kind not in gguf_codes.FORMATS]  # those of codes are SCALED, below
ROWS, COLUMNS = 96, 512


def edge_of(data: memoryview, kind: GGMLQuantizationType) -> float:
    return quantised_edge(gguf_quants.rounding_variances(data, (ROWS, COLUMNS), kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_edge_of_a_floating_point_matrix_follows_from_its_spacings(dtype: torch.dtype) -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0).to(dtype)
    variances = oracle.spacings(matrix).square() / 12
    expected = float(variances.sum(1).max().sqrt() + variances.sum(0).max().sqrt())
    assert floating_point_edge(matrix) == pytest.approx(expected, rel=1e-5)


def test_the_noise_of_a_pair_spreads_as_far_as_both_edges() -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0)
    variances = RoundingVariances(3.0, 2.0)
    assert noise_std((matrix, matrix), (None, None)) is None
    std = noise_std((matrix, matrix), (variances, None))
    assert std is not None
    assert std * (ROWS**0.5 + COLUMNS**0.5) == pytest.approx(quantised_edge(variances) + floating_point_edge(matrix))


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", ["even", "large rows", "large columns"])
def test_rounding_errors_stay_within_the_edge(kind: GGMLQuantizationType, shape: str) -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0)
    if shape == "large rows":
        matrix[::30] *= 8
    if shape == "large columns":
        matrix[:, ::100] *= 8
    data = memoryview(quants.quantize(matrix.numpy(), kind).tobytes())
    error = torch.linalg.matrix_norm(gguf_quants.dequantise(data, (ROWS, COLUMNS), kind) - matrix, 2)
    edge = edge_of(data, kind)
    assert edge / 4 < error <= edge / 2  # the other half is for weights that had been rounded before


# Every second level of Q5_0 lies halfway between two of Q4_0 and is rounded to the same side: no margin covers that.
TWICE = [(one, other) for one in WRITTEN for other in WRITTEN if (one.name, other.name) != ("Q5_0", "Q4_0")]


@pytest.mark.parametrize(("before", "kind"), TWICE, ids=lambda kind: kind.name)
def test_also_those_of_weights_that_had_been_rounded_before(
    before: GGMLQuantizationType, kind: GGMLQuantizationType
) -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0) + factories.gaussian(ROWS, 1, seed=1)
    rounded = torch.from_numpy(quants.dequantize(quants.quantize(matrix.numpy(), before), before))
    data = memoryview(quants.quantize(rounded.numpy(), kind).tobytes())
    error = torch.linalg.matrix_norm(gguf_quants.dequantise(data, (ROWS, COLUMNS), kind) - rounded, 2)
    assert error <= edge_of(data, kind)


SCALED = {
    "blocks": lambda matrix: fp8(matrix, (32, 32)),
    "rows": lambda matrix: fp8(matrix, (1, COLUMNS)),
    "one scale": lambda matrix: fp8(matrix, (ROWS, COLUMNS)),
    "MXFP4": lambda matrix: mxfp4(matrix),
}


def fp8(matrix: torch.Tensor, block: scaled_codes.Block) -> tuple[torch.Tensor, float]:
    """Values and noise edge of a matrix in FP8."""
    codes, scales = quantised.fp8(matrix, block)
    arguments = (codes.view(torch.uint8), scales, block, scaled_codes.FP8)
    return scaled_codes.dequantise(*arguments), quantised_edge(scaled_codes.rounding_variances(*arguments))


def mxfp4(matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Values and noise edge of a matrix in MXFP4."""
    blocks, scales = quantised.mxfp4(matrix)
    codes, factors = scaled_codes.unpack_nibbles(blocks), scaled_codes.decode_exponents(scales)
    arguments = (codes, factors, scaled_codes.MXFP4_BLOCK, scaled_codes.MXFP4)
    return scaled_codes.dequantise(*arguments), quantised_edge(scaled_codes.rounding_variances(*arguments))


@pytest.mark.parametrize("kind", SCALED)
@given(
    row_spread=st.floats(0, 1),
    tails=st.floats(1, 3),
    mean=st.floats(0, 3),
    is_rounded=st.booleans(),
    seed=st.integers(0),
)
@settings(max_examples=30)
def test_fp8_and_mxfp4_stay_within_the_edge_of_their_levels_and_scales(
    kind: str, row_spread: float, tails: float, mean: float, is_rounded: bool, seed: int
) -> None:
    seed %= 2**31
    matrix = factories.gaussian(ROWS, COLUMNS, seed=seed)
    matrix = matrix.sign() * matrix.abs() ** tails * (row_spread * factories.gaussian(ROWS, 1, seed=seed + 1)).exp()
    matrix += mean * factories.gaussian(ROWS, 1, seed=seed + 2)
    if is_rounded:
        matrix = matrix.bfloat16().float()
    values, edge = SCALED[kind](matrix)
    error = float(torch.linalg.matrix_norm(values - matrix, 2))
    assert edge / 4 < error <= edge


@pytest.mark.parametrize("before", SCALED)
@pytest.mark.parametrize("after", SCALED)
def test_weights_that_were_quantised_before_stay_within_three_times_the_edge(before: str, after: str) -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0) + factories.gaussian(ROWS, 1, seed=1)
    once = SCALED[before](matrix)[0]
    twice, edge = SCALED[after](once)
    assert float(torch.linalg.matrix_norm(twice - once, 2)) <= 3 * edge
