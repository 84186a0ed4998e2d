"""Many displacements in one call: the same results as one after the other, in any company and on any threads."""

import pytest
import torch
from torch import Tensor

import devices
import factories
from csulora.errors import InputError
from csulora.native import _core


def pair(seed: int, rows: int = 320, columns: int = 500) -> tuple[Tensor, Tensor]:
    base = factories.gaussian(rows, columns, seed=seed)
    signals = factories.with_spectrum(rows, columns, torch.tensor([90.0, 70, 60]).double(), seed=seed).float()
    return base, base + factories.gaussian(rows, columns, seed=seed + 100) + signals


def tasks(count: int) -> list[_core.ExtractTask]:
    return [_core.ExtractTask(*map(devices.place, pair(seed)), f"experts.{seed}") for seed in range(count)]


def options() -> _core.ExtractOptions:
    chosen = _core.ExtractOptions()
    chosen.rank = 8
    return chosen


def assert_same_bits(found: _core.Subspace, expected: _core.Subspace) -> None:
    assert torch.equal(found.u, expected.u)
    assert torch.equal(found.s, expected.s)
    assert torch.equal(found.v, expected.v)


def test_a_batch_equals_one_by_one() -> None:
    for task, found in zip(tasks(4), _core.extract_subspaces(tasks(4), options()), strict=True):
        alone = _core.extract_subspace(task.base, task.aligned, options())
        torch.testing.assert_close(found.s, alone.s, rtol=1e-5, atol=0.0)
        overlap = found.u[:, :3].float().t() @ alone.u[:, :3].float()
        assert float(overlap.square().sum()) == pytest.approx(3, abs=1e-3)
        assert found.certificate.standing_out == alone.certificate.standing_out == 3


def test_a_task_lets_go_of_its_matrices() -> None:
    (task,) = tasks(1)
    expected = _core.extract_subspace(task.base, task.aligned, options())
    assert_same_bits(_core.extract_subspace(task, options()), expected)
    assert task.base is None
    assert task.aligned is None
    with pytest.raises(InputError, match=r"^experts\.0: base"):
        _core.extract_subspace(task, options())


@pytest.mark.parametrize("threads", [1, 2])
def test_company_and_threads_change_no_bits(threads: int, restore_threads: None) -> None:
    together = _core.extract_subspaces(tasks(4), options())
    torch.set_num_threads(threads)
    for found, task in zip(together, tasks(4), strict=True):
        assert_same_bits(_core.extract_subspaces([task], options())[0], found)
    for found, expected in zip(_core.extract_subspaces(tasks(3), options()), together[:3], strict=True):
        assert_same_bits(found, expected)


def test_each_has_its_own_noise() -> None:
    base, aligned = map(devices.place, pair(0))
    quiet, loud = (_core.ExtractTask(base, aligned, noise_std=std) for std in (0.0, 2.0))
    ranks = [found.s.shape[0] for found in _core.extract_subspaces([quiet, loud], options())]
    assert ranks == [8, 1]


def test_the_first_that_cannot_be_used_is_named() -> None:
    given = tasks(3)
    given[1] = _core.ExtractTask(torch.ones(2, 3), torch.ones(3, 2), "experts.1.up_proj")
    with pytest.raises(InputError, match=r"^experts\.1\.up_proj: base is"):
        _core.extract_subspaces(given, options())
