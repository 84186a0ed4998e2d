"""Frozen layers in half precision multiply in float32 on CPUs that would emulate it, and stay what they are."""

import copy

import pytest
import torch
from torch import nn

from csulora.tuning import half_precision
from csulora.tuning.half_precision import widen_products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "_is_emulated", lambda weight: weight.itemsize == 2)


def layer(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.usefixtures("emulating")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_and_gradients_are_those_of_float64_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    wide = layer(dtype, bias=bias)
    exact = copy.deepcopy(wide).double()
    widen_products(nn.Sequential(wide))
    x = torch.randn(3, 5, 48).to(dtype)
    found, truth = (each.detach().clone().requires_grad_() for each in (x, x.double()))
    output, expected = wide(found), exact(truth)
    weights = torch.randn(3, 5, 32).to(dtype)
    output.backward(weights)
    expected.backward(weights.double())
    assert output.dtype == dtype
    for mine, right in ((output, expected), (found.grad, truth.grad)):
        assert (mine.double() - right).abs().max() <= torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.usefixtures("emulating")
def test_no_copy_of_a_weight_is_kept_for_the_backward_pass() -> None:
    wide, kept = layer(torch.bfloat16), []
    widen_products(wide)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        wide(torch.randn(2, 48, dtype=torch.bfloat16, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [wide.weight.data_ptr()]


@pytest.mark.usefixtures("emulating")
def test_hooks_and_copies_work_as_before() -> None:
    wide, seen = layer(torch.bfloat16), []
    widen_products(wide)
    wide.register_forward_hook(lambda module, inputs, output: seen.append(module) or output + 1)
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    other = copy.deepcopy(wide)
    nn.init.zeros_(other.weight)
    assert torch.equal(other(x), (other.bias + 1).expand(2, -1))
    assert not torch.equal(wide(x), other(x))
    assert seen[1] is wide


def test_layers_of_other_types_keep_their_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "_is_emulated", lambda weight: False)
    native, single = layer(torch.bfloat16), layer(torch.float32)
    widen_products(nn.Sequential(native, single))
    assert "forward" not in vars(native) | vars(single)
    monkeypatch.undo()
    assert not half_precision._is_emulated(single.weight)


@pytest.mark.usefixtures("emulating")
def test_a_weight_that_learns_has_its_gradient_and_another_type_its_own_product() -> None:
    wide = layer(torch.bfloat16)
    widen_products(wide)
    wide.requires_grad_()(torch.randn(2, 48, dtype=torch.bfloat16)).sum().backward()
    assert wide.weight.grad is not None
    assert wide.bias.grad is not None
    exact, x = wide.double().requires_grad_(False), torch.randn(2, 48, dtype=torch.float64)
    assert torch.equal(exact(x), nn.functional.linear(x, exact.weight, exact.bias))
