"""Updates in 16 bits, of which one half or a few columns may all but vanish, against the dense float64 oracle."""

import math

import pytest
import torch
from torch import Tensor

import oracle
from csulora.native import _core
from tolerances import CANCELLED, PROJECTOR, STORED

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


@pytest.mark.parametrize("powers", [(-80, 50), (50, -80), (-66, 66), (66, -66), (100, -100)])
def test_numbers_whose_squares_float32_does_not_hold_are_measured(powers: tuple[int, int]) -> None:
    u, v = (factor.half() for factor in updates()["bases"])
    b, a = (factor.bfloat16() for factor in updates()["nothing"])
    subspace = _core.Subspace(u, torch.arange(1, DIRECTIONS + 1).float().rsqrt(), v)
    factors = [_core.LoraFactors(b, a), _core.LoraFactors(b * 2.0 ** powers[0], a * 2.0 ** powers[1])]
    tasks = [_core.CorrectionTask(each, subspace, _core.Penalties(0.0, 1.0, 1.0)) for each in factors]
    plain, tilted = _core.correct(tasks)
    for component in oracle.COMPONENTS:
        energies = [getattr(each.energies, component) for each in (plain, tilted)]
        assert energies[1] == pytest.approx(energies[0], abs=PROJECTOR[u.dtype])
    expected = oracle.update(plain.factors.b, plain.factors.a, 2.0 ** sum(powers))
    assert oracle.relative_error(oracle.update(tilted.factors.b, tilted.factors.a), expected) <= STORED[b.dtype]


@pytest.mark.parametrize("seed", range(10))
def test_what_rounding_leaves_outside_a_basis_is_no_part_of_the_update(seed: int) -> None:
    """All that a reads lies inside; the gains keep what little of b lies inside, and what of both lies outside."""
    torch.manual_seed(seed)
    u, v = torch.linalg.qr(torch.randn(256, 16))[0].half(), torch.linalg.qr(torch.randn(16, 16))[0].half()
    b = (0.05 * u.float() @ torch.randn(16, 1) + torch.randn(256, 1) / 16).half()
    subspace = _core.Subspace(u, torch.ones(16), v)
    factors, gains = _core.LoraFactors(b, torch.randn(1, 16).half()), _core.Components(1.0, 0.0, 0.0, 1.0)
    (found,) = _core.correct([_core.CorrectionTask(factors, subspace, gains)])
    assert found.truncation_error <= CANCELLED
