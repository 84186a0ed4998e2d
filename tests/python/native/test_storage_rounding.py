"""The noise edge against rounding whose exact displacement is known, in cases of every kind."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import devices
import factories
from csulora.native import _core

SHAPES = [(64, 64), (100, 400), (300, 160)]
SIZES = [0.01, 0.05, 0.2, 0.5, 1.0, 3.0, 10.0]  # of displacements, in spacings
DTYPES = [torch.float16, torch.bfloat16]


def gaussian(*shape: int, seed: int) -> Tensor:
    return factories.gaussian(*shape, seed=seed).double()


def four_bits(weights: Tensor) -> Tensor:
    """Weights that had been quantised to 16 levels per block of a row."""
    blocks = weights.reshape(len(weights), -1, 4)
    levels = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / levels).round() * levels).reshape(weights.shape)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda weights: weights,
    "outlier rows": lambda weights: torch.where(torch.arange(len(weights)) < 2, 30.0, 1.0).unsqueeze(1) * weights,
    "outlier columns": lambda weights: torch.where(torch.arange(weights.shape[1]) < 2, 30.0, 1.0) * weights,
    "every row another": lambda weights: weights * gaussian(len(weights), 1, seed=5).exp(),
    "four bits": four_bits,
}

# Displacements of size 1 about, which do not depend on where a weight lies between two storable numbers.
INDEPENDENT: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": lambda rows, columns, seed: gaussian(rows, columns, seed=seed),
    "spread evenly": lambda rows, columns, seed: torch.special.ndtr(gaussian(rows, columns, seed=seed)) * 2 - 1,
    "sparse": lambda rows, columns, seed: gaussian(rows, columns, seed=seed) * (gaussian(rows, columns, seed=9) > 2),
    "heavy tails": lambda rows, columns, seed: gaussian(rows, columns, seed=seed) ** 3 / 3,
    "every row another": lambda rows, columns, seed: (
        gaussian(rows, columns, seed=seed) * gaussian(rows, 1, seed=9).exp()
    ),
    "one row hot": lambda rows, columns, seed: (
        gaussian(rows, columns, seed=seed) * torch.where(torch.arange(rows) == 3, 2.0, 0.1).unsqueeze(1)
    ),
}
COHERENT: dict[str, Callable[[int, int, int], Tensor]] = {
    "low rank": lambda rows, columns, seed: gaussian(rows, 4, seed=seed) @ gaussian(4, columns, seed=9) / 2,
    "one size": lambda rows, columns, seed: gaussian(rows, columns, seed=seed).sign(),
}


def edge_over_rounding(weights: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    base, aligned = weights.to(dtype), (weights + exact).to(dtype)
    rounding = torch.linalg.svdvals(aligned.double() - base.double() - exact)[0]
    options = _core.ExtractOptions()
    options.rank = 1
    return devices.extract(base, aligned, options).certificate.noise_edge / float(rounding)


def spacing(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.finfo(dtype).eps * weights.abs().clamp_min(torch.finfo(dtype).smallest_normal).log2().floor().exp2()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [*INDEPENDENT, *COHERENT])
def test_rounding_of_both_stays_below_the_edge(moved: str, dtype: torch.dtype) -> None:
    """Weights anywhere between two storable numbers, as those of models that were stored once."""
    for seed, (size, form) in enumerate(product(SIZES, WEIGHTS)):
        shape = SHAPES[seed % len(SHAPES)]
        weights = WEIGHTS[form](0.02 * gaussian(*shape, seed=seed))
        exact = size * spacing(weights, dtype) * (INDEPENDENT | COHERENT)[moved](*shape, seed + 100)
        assert edge_over_rounding(weights, exact, dtype) >= 1, (size, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", INDEPENDENT)
def test_rounding_of_a_model_tuned_from_its_stored_form_stays_below_the_edge(moved: str, dtype: torch.dtype) -> None:
    for seed, (size, form) in enumerate(product(SIZES, WEIGHTS)):
        shape = SHAPES[seed % len(SHAPES)]
        weights = WEIGHTS[form](0.02 * gaussian(*shape, seed=seed)).to(dtype).double()
        exact = size * spacing(weights, dtype).median() * INDEPENDENT[moved](*shape, seed + 100)
        assert edge_over_rounding(weights, exact, dtype) >= 1, (size, form)


@pytest.mark.parametrize("size", [0.2, 0.3, 0.5])
def test_what_vanishes_in_storage_turns_no_direction_that_is_kept(size: float) -> None:
    """A displacement below half a spacing is lost where the base was stored: more than the edge, but along itself."""
    weights = gaussian(600, 500, seed=0).bfloat16()
    left, right = gaussian(600, 4, seed=1), gaussian(500, 4, seed=2)
    exact = size * spacing(weights.double(), torch.bfloat16).median() * (left @ right.T) / 2
    options = _core.ExtractOptions()
    options.rank = 4
    found = devices.extract(weights, (weights.double() + exact).bfloat16(), options)
    assert found.s.shape[0] == 4
    for true, kept in ((left, found.u), (right, found.v)):
        assert float((torch.linalg.qr(true).Q.T @ kept.double()).square().sum()) / 4 > 0.9


@pytest.mark.parametrize("size", [0.05, 0.2, 0.5, 2.0])
def test_the_edge_lies_closely_above_rounding_however_little_weights_moved(size: float) -> None:
    """A floor of a twelfth of the squared spacing is all that is added to what weights that hardly moved show."""
    weights = 0.02 * gaussian(500, 400, seed=0)
    exact = size * spacing(weights, torch.bfloat16) * gaussian(500, 400, seed=1)
    variance = size * 0.8 * (1 - size * 0.8) if size < 0.5 else 1 / 6  # a half-normal p has the mean 0.8
    most = 1.3 * max(1.0, (1 / 12 / variance) ** 0.5)
    assert 1 <= edge_over_rounding(weights, exact, torch.bfloat16) <= most
