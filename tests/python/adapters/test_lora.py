"""Whether factors are finite, found from their bits."""

import math

import pytest
import torch

from csulora.adapters import lora
from csulora.adapters.lora import has_same_bits, is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def matrix(dtype: torch.dtype, value: float) -> torch.Tensor:
    """Return a matrix with one such value, in the last row."""
    found = torch.zeros(5, 3, dtype=torch.float64)
    found[4, 1] = value
    return found.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [1, 4, 1 << 20])
def test_bits_say_whether_a_number_is_finite(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_AT_ONCE", at_once)
    limits = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, -1.0, limits.max, limits.min, limits.smallest_normal, limits.smallest_normal / 2):
        assert is_finite(matrix(dtype, value))
        assert is_finite(matrix(dtype, value).t())
    for value in (math.inf, -math.inf, math.nan):
        assert not is_finite(matrix(dtype, value))
        assert not is_finite(matrix(dtype, value).t())
        assert not is_finite(matrix(dtype, value)[4])
        assert is_finite(matrix(dtype, value)[:4])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_number_of_two_bytes_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)

    assert [is_finite(number) for number in every] == every.isfinite().tolist()


def test_a_tensor_that_wants_a_gradient_is_judged() -> None:
    assert is_finite(matrix(torch.float32, 1.0).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_have_the_same_bits(dtype: torch.dtype) -> None:
    one = torch.randn(5, 3).to(dtype)
    other = one.clone()
    other[4, 2] += 1

    assert has_same_bits(one, one.clone())
    assert has_same_bits(one.t(), one.clone().t())
    assert not has_same_bits(one, other)
    assert not has_same_bits(one, one[:4])
    assert not has_same_bits(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype))
    assert not has_same_bits(torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=torch.int32))
