"""The modes that a host sets in torch for its own computations change nothing, neither meanwhile nor afterwards."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

import devices
import factories
import oracle
from csulora.native import _core
from tolerances import COMPUTED, STORED


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(devices.current.type, torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def tasks() -> list[_core.CorrectionTask]:
    factors, subspace = (
        devices.factors(factories.lora_factors(70, 50, 4)),
        devices.subspace(factories.core_subspace(70, 50, 6)),
    )
    input_filter = _core.InputFilter(*(devices.place(0.1 * factories.gaussian(50, 3, seed=seed)) for seed in (1, 2)))
    directions = _core.Directions([0.5, 0.1], [0.25], [0.5])
    return [
        _core.CorrectionTask(factors, subspace, _core.Penalties(0, 1, 1)),
        _core.CorrectionTask(factors, subspace, directions),
        _core.CorrectionTask(factors, subspace, directions, input_filter=input_filter),
    ]


def corrected(tasks: list[_core.CorrectionTask]) -> list[Tensor]:
    results = _core.correct(tasks)
    return [factor for result in results for factor in (result.factors.b, result.factors.a)]


@every_mode
def test_a_correction_is_the_same_in_every_mode_and_after_it(
    mode: Callable[[], AbstractContextManager[object]], restore_threads: None
) -> None:
    torch.set_num_threads(1)  # all of it in the thread whose mode it is
    inputs = tasks()
    before = corrected(inputs)
    with mode():
        within = corrected(inputs)
    after = corrected(inputs)
    for factors in zip(before, within, after, strict=True):
        assert all(torch.equal(factors[0], factor) and factor.dtype == factors[0].dtype for factor in factors)
    assert not any(factor.is_inference() for factor in within)


@every_mode
def test_an_extraction_is_the_same_in_every_mode_and_after_it(
    mode: Callable[[], AbstractContextManager[object]], restore_threads: None
) -> None:
    torch.set_num_threads(1)
    options = _core.ExtractOptions()
    options.rank = 3
    workspace = _core.Workspace()
    base = devices.place(factories.gaussian(300, 200, seed=1))
    moved = base + devices.place(factories.with_spectrum(300, 200, torch.tensor([90.0, 70, 60]).double()).float())

    def extracted() -> tuple[_core.Subspace, float]:
        found = _core.extract_subspace(base, moved, options, workspace)
        _core.validate(found)
        return found, _core.certify(base, moved, found, options).subspace_error

    before, subspace_error = extracted()
    with mode():
        within = extracted()
    for found, share in (within, extracted()):
        assert torch.equal(found.u, before.u)
        assert torch.equal(found.v, before.v)
        assert found.certificate.subspace_error == before.certificate.subspace_error
        assert share == subspace_error


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_along_directions_a_hosts_short_float32_products_cost_no_digits(precision: str) -> None:
    task = tasks()[1]
    before, expected = torch.get_float32_matmul_precision(), oracle.update(*corrected([task]))
    torch.set_float32_matmul_precision(precision)
    try:
        found = oracle.update(*corrected([task]))
    finally:
        torch.set_float32_matmul_precision(before)
    assert oracle.relative_error(found, expected) <= COMPUTED[torch.float32] + STORED[torch.float32]
