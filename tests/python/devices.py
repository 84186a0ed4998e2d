"""The device that tests of the core compute on; results come back to the CPU, where the oracle is."""

from typing import NamedTuple

import pytest
import torch

from csulora.device import gpu_usable
from csulora.native import _core

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not gpu_usable(), reason="no CUDA device"))]
current = torch.device("cpu")


def use(name: str) -> None:
    global current
    current = torch.device(name)


class Extracted(NamedTuple):
    """A `_core.Subspace` on the CPU."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    certificate: _core.Certificate


def correct(tasks: list[_core.CorrectionTask], options: _core.CorrectionOptions) -> list[_core.Correction]:
    return [
        _core.Correction(
            _core.LoraFactors(result.factors.b.cpu(), result.factors.a.cpu(), result.factors.scale),
            *(
                getattr(result, name)
                for name in ("energies", "gains", "norm", "relative_change", "undo", "undo_after", "truncation_error")
            ),
        )
        for result in _core.correct(tasks, options)
    ]


def place(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor to the device, unless it has no values."""
    return tensor if tensor.is_meta else tensor.to(current)


def factors(given: _core.LoraFactors) -> _core.LoraFactors:
    return _core.LoraFactors(place(given.b), place(given.a), given.scale)


def subspace(factors: _core.Subspace | Extracted) -> _core.Subspace:
    return _core.Subspace(place(factors.u), place(factors.s), place(factors.v))


def extract(base: torch.Tensor, aligned: torch.Tensor, options: _core.ExtractOptions) -> Extracted:
    found = _core.extract_subspace(base.to(current), aligned.to(current), options)
    assert {found.u.device, found.s.device, found.v.device} == {base.to(current).device}
    return Extracted(found.u.cpu(), found.s.cpu(), found.v.cpu(), found.certificate)


def certify(base: torch.Tensor, aligned: torch.Tensor, found: _core.Subspace | Extracted) -> _core.Certificate:
    return _core.certify(base.to(current), aligned.to(current), subspace(found))
