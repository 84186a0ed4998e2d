"""Updates in 16 bits, of which one half or a few columns may all but vanish, against the dense float64 oracle."""

import math

import pytest
import torch
from torch import Tensor

import oracle
from csulora.native import _core
from tolerances import STORED

ROWS, COLUMNS, DIRECTIONS, RANK = 512, 768, 16, 8


def basis(length: int) -> Tensor:
    return torch.linalg.qr(torch.randn(length, DIRECTIONS))[0].half()


def updates() -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors by what is special about them, and the bases of the subspace under ``bases``."""
    torch.manual_seed(0)
    u, v = basis(ROWS).float(), basis(COLUMNS).float()
    b, a = torch.randn(ROWS, RANK) / math.sqrt(ROWS), torch.randn(RANK, COLUMNS) / math.sqrt(COLUMNS)
    inside_b, inside_a = u @ torch.randn(DIRECTIONS, RANK), torch.randn(RANK, DIRECTIONS) @ v.t()
    half = RANK // 2
    return {
        "bases": (u, v),
        "nothing": (b, a),
        "b lies inside": (inside_b, a),
        "a lies inside": (b, inside_a),
        "a all but lies inside": (b, inside_a + 1e-3 * a),
        "b's columns depend on others": (torch.cat([b[:, :half], b[:, :half]], 1), a),
        "a's rows all but depend on others": (b, torch.cat([a[:half], 1.001 * a[:half]])),
        "a has a row of zeros": (b, torch.cat([torch.zeros(1, COLUMNS), a[1:]])),
    }


@pytest.mark.parametrize("special", [name for name in updates() if name != "bases"])
@pytest.mark.parametrize("penalties", [(0.0, 1.0, 1.0), (0.0, math.inf, math.inf), (math.inf, math.inf, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_correction_is_exact_to_storage_rounding(
    special: str, penalties: tuple[float, float, float], dtype: torch.dtype
) -> None:
    u, v = (factor.half() for factor in updates()["bases"])
    b, a = (factor.to(dtype) for factor in updates()[special])
    subspace = _core.Subspace(u, torch.arange(1, DIRECTIONS + 1).float().rsqrt(), v)
    task = _core.CorrectionTask(_core.LoraFactors(b, a), subspace, _core.Penalties(*penalties))
    (found,) = _core.correct([task], _core.CorrectionOptions(_core.RankRule.exact))
    expected = oracle.closest_safe_update(oracle.update(b, a), u, v, penalties)
    largest = oracle.update(b, a).norm()  # where next to nothing is kept, its rounding is that of what it is left of
    difference = (oracle.update(found.factors.b, found.factors.a) - expected).norm()
    assert difference <= STORED[dtype] * (expected.norm() + 1e-3 * largest)
