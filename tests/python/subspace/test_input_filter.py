"""Corrections that act on some inputs alone, against their dense twin."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import factories
import oracle
from csulora import Policy, Subspace, correct
from csulora.errors import InputError
from csulora.policy.overrides import Directions, Override
from csulora.subspace.input_filter import InputFilter
from tolerances import COMPUTED, STORED, TRACES

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN, UP, Q = sorted(factories.SHAPES)


def along(left: tuple[float, ...], right: tuple[float, ...], reinforced: tuple[float, ...] = ()) -> Policy:
    return Policy.none(overrides=(Override("*", directions=Directions(left, right, reinforced)),))


REINFORCING = along((0.5, 0.0), (0.25,), (0.5, 0.0, -0.25))
EXACT = replace(REINFORCING, rank="exact")


def input_filter(columns: int, directions: int = 3, seed: int = 7) -> InputFilter:
    """Some F that is no projector."""
    p, q = (factories.gaussian(columns, directions, seed=seed + i) / columns**0.5 for i in range(2))
    return InputFilter(p, q)


def filtered_subspace(seed: int = 7) -> Subspace:
    shapes = factories.SHAPES.items()
    return factories.subspace().with_input_filters(
        {name: input_filter(columns, seed=seed) for name, (_, columns) in shapes}
    )


def matrix(of: InputFilter) -> Tensor:
    return of.p.double() @ of.q.double().T


def twin(whole: Tensor, wanted: Tensor, of: InputFilter) -> Tensor:
    """X = dW + (X' - dW) F, dense, float64."""
    return whole + (wanted - whole) @ matrix(of)


@pytest.mark.parametrize(
    "policy",
    [
        REINFORCING,
        along((0.5, 1.0, 0.0), (0.3, 0.2)),
        along((), (0.0,) * 6),
        along((0.25,) * 6, ()),
        along((), (), (2.0, 0.5)),
        replace(along((0.5,) * 3, (0.5,) * 3, (0.5,) * 3), reference_energy=0.3),
        along((1.0,), (1.0,)),
    ],
)
@pytest.mark.parametrize("scale", [2.0, 1e-3])
def test_a_filtered_correction_is_its_dense_twin(policy: Policy, scale: float) -> None:
    adapter, subspace, policy = factories.adapter(scale=scale), filtered_subspace(), replace(policy, rank="exact")
    plain, plain_report = correct(adapter, subspace, policy)
    fixed, report = correct(adapter, subspace, replace(policy, filtered=True))
    for name, measured, unfiltered in zip(adapter.modules, report.modules, plain_report.modules, strict=True):
        whole, wanted, x = (
            oracle.update(m.b, m.a, m.scale) for m in (each.modules[name] for each in (adapter, plain, fixed))
        )
        expected = twin(whole, wanted, subspace[name].input_filter)
        assert oracle.relative_error(x, expected) <= COMPUTED[torch.float32]
        assert measured.relative_change == pytest.approx(
            float((expected - whole).norm() / whole.norm()), rel=TRACES, abs=TRACES
        )
        assert [measured.norm, measured.undo] == pytest.approx([unfiltered.norm, unfiltered.undo], rel=TRACES)
        assert measured.energies == pytest.approx(unfiltered.energies, rel=TRACES)
        before, after = (
            oracle.split(update, subspace[name].u, subspace[name].v).components for update in (whole, expected)
        )
        for component, gain in measured.gains.items():
            assert gain == pytest.approx(float(after[component].norm() / before[component].norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_costs_what_rounding_the_result_would_where_the_update_cancels(dtype: torch.dtype) -> None:
    """An update of which a gain of 0 takes all but a hundredth, on every input."""
    subspace, shape = factories.subspace(), factories.SHAPES[Q]
    inside = subspace[Q].u[:, :2] @ factories.gaussian(2, 4, seed=1) + 0.01 * factories.gaussian(shape[0], 4, seed=2)
    plain = factories.adapter({Q: shape}, dtype=dtype)
    adapter = replace(plain, modules={Q: replace(plain.modules[Q], b=inside.to(dtype))})
    everything = {Q: InputFilter(torch.eye(shape[1]), torch.eye(shape[1]))}
    policy = replace(along((0.0, 0.0), (1.0,)), rank="exact")
    fixed, _ = correct(adapter, subspace.with_input_filters(everything), replace(policy, filtered=True))
    module, u = adapter.modules[Q], subspace[Q].u[:, :2].double()
    whole = oracle.update(module.b, module.a, module.scale)
    expected = whole - u @ (u.T @ whole)
    assert expected.norm() < 0.1 * whole.norm()
    x = oracle.update(fixed.modules[Q].b, fixed.modules[Q].a)
    assert oracle.relative_error(x, expected) <= STORED[dtype]


def test_inputs_outside_the_input_filter_meet_the_update_as_it_came() -> None:
    adapter, subspace = factories.adapter(), filtered_subspace()
    fixed, _ = correct(adapter, subspace, replace(EXACT, filtered=True))
    for name, module in adapter.modules.items():
        outside = torch.linalg.svd(subspace[name].input_filter.q.double().T)[2][3:]  # F x = 0
        before, after = (oracle.update(m.b, m.a, m.scale) @ outside.T for m in (module, fixed.modules[name]))
        assert oracle.relative_error(after, before) <= COMPUTED[torch.float32]


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_an_input_filter_of_all_inputs_is_none_and_one_of_no_inputs_keeps_the_update(seed: int, share: float) -> None:
    adapter, subspace = factories.adapter(seed=seed), factories.subspace()
    input_filters = {name: InputFilter(share * torch.eye(n), torch.eye(n)) for name, (_, n) in factories.SHAPES.items()}
    fixed, _ = correct(adapter, subspace.with_input_filters(input_filters), replace(EXACT, filtered=True))
    plain, _ = correct(adapter, subspace, EXACT)
    for name, module in adapter.modules.items():
        whole, wanted, x = (
            oracle.update(m.b, m.a, m.scale) for m in (module, plain.modules[name], fixed.modules[name])
        )
        assert oracle.relative_error(x, share * wanted + (1 - share) * whole) <= 2 * COMPUTED[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_rank_that_the_same_policy_keeps_elsewhere_and_the_storage_type(dtype: torch.dtype) -> None:
    adapter, subspace = factories.adapter(dtype=dtype), filtered_subspace()
    plain, _ = correct(adapter, subspace, REINFORCING)
    fixed, report = correct(adapter, subspace, replace(REINFORCING, filtered=True))
    whole, _ = correct(factories.adapter(dtype=torch.float32), subspace, replace(EXACT, filtered=True))
    for module in report.modules:
        name = module.module
        assert fixed.modules[name].rank == plain.modules[name].rank == module.rank_after == 4 + 2
        assert fixed.modules[name].b.dtype == fixed.modules[name].a.dtype == dtype
        if dtype == torch.float32:
            u, s, vh = torch.linalg.svd(oracle.update(whole.modules[name].b, whole.modules[name].a))
            cut = (u[:, :6] * s[:6]) @ vh[:6]
            x = oracle.update(fixed.modules[name].b, fixed.modules[name].a)
            assert oracle.relative_error(x, cut) <= COMPUTED[torch.float32] + STORED[torch.float32]
            assert module.truncation_error == pytest.approx(float(s[6:].square().sum() / s.square().sum()), rel=1e-3)
    assert all(
        each.rank == 2
        for each in correct(adapter, subspace, replace(REINFORCING, filtered=True, rank=2))[0].modules.values()
    )


def test_a_module_without_an_input_filter_is_corrected_on_all_inputs() -> None:
    adapter, subspace = factories.adapter(), factories.subspace().with_input_filters({UP: input_filter(40)})
    fixed, _ = correct(adapter, subspace, replace(EXACT, filtered=True))
    plain, _ = correct(adapter, subspace, EXACT)
    for name in (DOWN, Q):
        x, wanted = (oracle.update(m.b, m.a) for m in (fixed.modules[name], plain.modules[name]))
        assert oracle.relative_error(x, wanted) <= COMPUTED[torch.float32]


def test_an_update_of_nothing_stays_one() -> None:
    adapter, subspace = factories.adapter(), filtered_subspace()
    empty = replace(adapter, modules={n: replace(m, b=torch.zeros_like(m.b)) for n, m in adapter.modules.items()})
    fixed, report = correct(empty, subspace, replace(REINFORCING, filtered=True))
    assert all(not oracle.update(module.b, module.a).any() for module in fixed.modules.values())
    assert {module.relative_change for module in report.modules} == {0.0}


def test_input_filters_survive_a_file_and_are_part_of_its_identity(tmp_path: Path) -> None:
    subspace = filtered_subspace()
    subspace.save(tmp_path / "subspace")
    opened = Subspace.open(tmp_path / "subspace")
    assert opened.is_filtered
    assert not factories.subspace().is_filtered
    for name, module in subspace.items():
        assert torch.equal(opened[name].input_filter.p, module.input_filter.p)
        assert torch.equal(opened[name].input_filter.q, module.input_filter.q)
    assert opened.sha256 == subspace.sha256 != filtered_subspace(seed=8).sha256
    assert subspace.sha256 != factories.subspace().sha256


def test_an_input_filter_that_cannot_be_used_is_refused() -> None:
    adapter, policy = factories.adapter(), replace(REINFORCING, filtered=True)
    with pytest.raises(InputError, match="the subspace file has no input filters; use the one that tune wrote"):
        correct(adapter, factories.subspace(), policy)
    with pytest.raises(InputError, match=r"both must be \(in, f\) float32"):
        InputFilter(torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(InputError, match="they disagree"):
        factories.subspace().with_input_filters({Q: input_filter(41)})
    nan = InputFilter(torch.full((40, 1), math.nan), torch.ones(40, 1))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        correct(adapter, factories.subspace().with_input_filters({Q: nan}), policy)
    with pytest.raises(InputError, match="must be true or false"):
        Policy(filtered=1)  # type: ignore[arg-type]
    huge = factories.adapter(dtype=torch.float16)
    wide = InputFilter(1e12 * torch.ones(40, 1), torch.ones(40, 1))
    with pytest.raises(InputError, match="too large for Half"):
        correct(huge, factories.subspace().with_input_filters({Q: wide}), policy)
    with pytest.raises(InputError, match=f"{DOWN}: only gains of directions can be filtered"):
        correct(adapter, filtered_subspace(), Policy.csulora(filtered=True))
