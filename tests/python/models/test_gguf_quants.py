import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from csulora.models import gguf_codes, gguf_quants

# Levels of MXFP4 and NVFP4 are not evenly spaced.
EVEN = set(gguf_quants.QUANTISED) - {kind.name for kind in gguf_codes.FORMATS}
KINDS = [GGMLQuantizationType[name] for name in sorted(EVEN)]
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
