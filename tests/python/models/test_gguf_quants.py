import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

import factories
from csulora.models import gguf_quants

KINDS = [GGMLQuantizationType[name] for name in gguf_quants.QUANTISED]
WRITTEN = [kind for kind in KINDS if not kind.name.endswith("_K")]  # gguf has no quantiser for the others
ROWS, COLUMNS = 96, 512


def random_blocks(kind: GGMLQuantizationType) -> memoryview:
    """Blocks with random levels and scales of usual size."""
    block, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (ROWS * COLUMNS // block, size), np.uint8)
    scales = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind.name, 0)
    halves = 1 if kind.name in ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K") else 2
    blocks[:, scales : scales + 2 * halves] = np.full(halves, 0.01, np.float16).view(np.uint8)
    return memoryview(blocks.tobytes())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_spacing_is_that_of_the_levels(kind: GGMLQuantizationType) -> None:
    """In every block the values that occur lie whole steps apart, and the steps are no larger than need be."""
    data = random_blocks(kind)
    values = gguf_quants.dequantise(data, (ROWS, COLUMNS), kind).double().reshape(-1, 16)  # the smallest sub-block
    levels = gguf_quants._LEVELS[kind]
    low, high = (
        torch.from_numpy(
            quants.dequantize(
                gguf_quants._with_bits(gguf_quants._rows(data, (ROWS, COLUMNS)), kind, levels.bits, bits), kind
            )
        )
        for bits in (0x00, 0xFF)
    )
    step = ((high - low).abs() / levels.steps).double().reshape(-1, 16)[:, 0]
    moved = step > 0
    steps = (values[moved] - values[moved][:, :1]) / step[moved][:, None]
    assert torch.allclose(steps, steps.round(), atol=1e-2)
    differences = (steps[:, :, None] - steps[:, None]).round().long().abs().flatten(1)
    assert np.gcd.reduce(differences.unique().numpy()) == 1


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", ["even", "large rows", "large columns"])
def test_rounding_errors_stay_within_the_edge(kind: GGMLQuantizationType, shape: str) -> None:
    matrix = factories.gaussian(ROWS, COLUMNS, seed=0)
    if shape == "large rows":
        matrix[::30] *= 8
    if shape == "large columns":
        matrix[:, ::100] *= 8
    data = memoryview(quants.quantize(matrix.numpy(), kind).tobytes())
    error = torch.linalg.matrix_norm(gguf_quants.dequantise(data, (ROWS, COLUMNS), kind) - matrix, 2)
    edge = gguf_quants.rounding_edge(data, (ROWS, COLUMNS), kind)
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
    assert error <= gguf_quants.rounding_edge(data, (ROWS, COLUMNS), kind)
