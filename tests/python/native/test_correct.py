"""The correction against the dense float64 oracle, and the invariants of the closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import devices
import factories
import oracle
from csulora.errors import InputError
from csulora.native import _core
from tolerances import CANCELLED, COMPUTED, PROJECTOR, SMALLEST, STORED, TRACES

Penalties = tuple[float, float, float]

EXACT = _core.CorrectionOptions(_core.RankRule.exact)
KEEP = _core.CorrectionOptions(_core.RankRule.keep)
PRESETS: dict[str, Penalties] = {
    "csulora": (0.0, 1.0, 1.0),
    "project": (0.0, math.inf, math.inf),
    "protect": (1.0, 1.0, 0.0),
    "remove": (math.inf, math.inf, 0.0),
    "none": (0.0, 0.0, 0.0),
    "uneven": (3.0, 0.5, 20.0),
}
TOLERANCE = COMPUTED[torch.float32]


def correct(
    factors: _core.LoraFactors,
    subspace: _core.Subspace,
    attenuation: Penalties | _core.Components,
    options: _core.CorrectionOptions = EXACT,
) -> _core.Correction:
    numbers = _core.Penalties(*attenuation) if isinstance(attenuation, tuple) else attenuation
    task = _core.CorrectionTask(devices.factors(factors), devices.subspace(subspace), numbers, "layer")
    return devices.correct([task], options)[0]


def dense(result: _core.Correction) -> torch.Tensor:
    return oracle.update(result.factors.b, result.factors.a, result.factors.scale)


def dense_update(factors: _core.LoraFactors) -> torch.Tensor:
    return oracle.update(factors.b, factors.a, factors.scale)


def expected(factors: _core.LoraFactors, subspace: _core.Subspace, penalties: Penalties) -> torch.Tensor:
    return oracle.closest_safe_update(dense_update(factors), subspace.u, subspace.v, penalties)


def sizes(low: int, high: int) -> st.SearchStrategy[int]:
    """Whole numbers spread evenly over orders of magnitude."""
    return st.floats(math.log(low), math.log(high)).map(lambda x: min(high, max(low, round(math.exp(x)))))


@st.composite
def problems(draw: st.DrawFn, largest: int = 200) -> tuple[_core.LoraFactors, _core.Subspace]:
    rows, columns = draw(sizes(8, largest)), draw(sizes(8, largest))
    shorter = min(rows, columns)
    rank = draw(sizes(1, min(256, shorter)))
    directions = draw(sizes(1, min(512, shorter)))
    seed = draw(st.integers(0, 2**31 - 1))
    scale = draw(st.sampled_from([1.0, 0.25, 16.0, -2.0]))
    return factories.lora_factors(rows, columns, rank, seed, scale), factories.core_subspace(
        rows, columns, directions, seed % 7
    )


def _inside(basis: torch.Tensor, columns: int) -> torch.Tensor:
    return basis.float() @ factories.gaussian(basis.shape[1], columns, seed=11)


def _bound(factors: _core.LoraFactors, factor: float = 1.0) -> float:
    """What float32 factors may be off by, denormal ones included."""
    denormals = SMALLEST * math.sqrt(factors.b.numel()) * float(factors.a.double().norm())
    return TOLERANCE * factor * float(dense_update(factors).norm()) + denormals


def _graded(rank: int, low: float, high: float) -> torch.Tensor:
    return torch.logspace(math.log10(low), math.log10(high), rank)


def _adversarial() -> dict[str, tuple[_core.LoraFactors, _core.Subspace]]:
    rows, columns, rank = 60, 44, 6
    subspace = factories.core_subspace(rows, columns, 9)
    b, a = factories.gaussian(rows, rank, seed=1), factories.gaussian(rank, columns, seed=2)
    parallel = b[:, :1] + 1e-4 * b
    factors = {
        "denormal b": (1e-41 * b, a),
        "tiny factors": (1e-19 * b, 1e-19 * a),
        "huge b": (1e37 * b, a),
        "huge b, tiny a": (1e30 * b, 1e-30 * a),
        "zero columns": (b * torch.tensor([1.0, 0, 1, 0, 1, 1]), a * torch.tensor([[1.0], [1], [0], [0], [1], [1]])),
        "duplicated columns": (b[:, [0, 0, 1, 1, 1, 2]], a),
        "near-parallel columns": (parallel, a),
        "near-parallel columns that cancel": (parallel, a - a.mean(0)),
        "graded columns": (b * _graded(rank, 1e-6, 1e6), a / _graded(rank, 1e-6, 1e6).unsqueeze(1)),
        "b inside": (_inside(subspace.u, rank), a),
        "a inside": (b, _inside(subspace.v, rank).t().contiguous()),
        "both inside": (_inside(subspace.u, rank), _inside(subspace.v, rank).t().contiguous()),
    }
    problems_ = {name: (_core.LoraFactors(*each, 0.5), subspace) for name, each in factors.items()}
    wide = factories.lora_factors(12, 9, 20, seed=3), factories.core_subspace(12, 9, 4)
    everything = factories.lora_factors(30, 20, 5, seed=4), factories.core_subspace(30, 20, 20)
    half = factories.lora_factors(rows, columns, rank), factories.core_subspace(rows, columns, 9, dtype=torch.bfloat16)
    return problems_ | {"r > min(m, n)": wide, "k = min(m, n)": everything, "bfloat16 basis": half}


ADVERSARIAL = _adversarial()
adversarial = pytest.mark.parametrize("problem", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
every_preset = pytest.mark.parametrize("preset", sorted(PRESETS))


@adversarial
@every_preset
@pytest.mark.parametrize("options", [EXACT, KEEP], ids=["exact", "keep"])
def test_adversarial_updates_agree_with_the_dense_oracle(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, options: _core.CorrectionOptions
) -> None:
    factors, subspace = problem
    update = dense_update(factors)
    whole = expected(factors, subspace, PRESETS[preset])
    result = correct(factors, subspace, PRESETS[preset], options)
    reference = oracle.best_approximation(whole, factors.a.shape[0]) if options is KEEP else whole
    # Against the update, because what is kept of it may be nothing but rounding.
    assert float((dense(result) - reference).norm()) <= _bound(factors)
    energies = {name: getattr(result.energies, name) for name in oracle.COMPONENTS}
    assert energies == pytest.approx(oracle.split(update, subspace.u, subspace.v).energies, abs=TRACES)
    assert sum(energies.values()) == pytest.approx(1.0, abs=1e-12)
    assert result.relative_change <= 1
    again = correct(factors, subspace, PRESETS[preset], options)
    assert torch.equal(again.factors.b, result.factors.b)
    assert torch.equal(again.factors.a, result.factors.a)


@adversarial
def test_adversarial_updates_are_projected_once_and_for_all(
    problem: tuple[_core.LoraFactors, _core.Subspace],
) -> None:
    factors, subspace = problem
    once = correct(factors, subspace, PRESETS["project"])
    twice = correct(once.factors, subspace, PRESETS["project"])
    assert float((dense(twice) - dense(once)).norm()) <= PROJECTOR[subspace.u.dtype] * float(dense(once).norm())


@adversarial
@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"none"}))  # `none` hands the factors back as they are
@pytest.mark.parametrize("factor", [-1.0, 2.0**-6, 3.0])
def test_adversarial_updates_are_corrected_alike_at_any_scale(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, factor: float
) -> None:
    factors, subspace = problem
    scaled = _core.LoraFactors(factors.b, factors.a, factor * factors.scale)
    plain, result = (dense(correct(p, subspace, PRESETS[preset])) for p in (factors, scaled))
    assert float((result - factor * plain).norm()) <= _bound(factors, abs(factor))


@adversarial
@pytest.mark.parametrize("preset", ["csulora", "protect", "uneven"])
def test_no_perturbation_of_an_adversarial_update_costs_less(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str
) -> None:
    factors, subspace = problem
    update, penalties = dense_update(factors), PRESETS[preset]
    size = float(update.norm())  # costs are squares: keep them in float64's range
    best = dense(correct(factors, subspace, penalties)) / size
    direction = factories.gaussian(*update.shape, seed=9).double()
    step = 1e-2 * direction / direction.norm()
    u, v = (oracle.orthonormalised(basis) for basis in (subspace.u, subspace.v))
    cost = oracle.objective(best, update / size, u, v, penalties)
    for sign in (-1, 1):
        assert oracle.objective(best + sign * step, update / size, u, v, penalties) > cost


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(problem=problems(largest=4096), preset=st.sampled_from(sorted(PRESETS)))
def test_agrees_with_the_dense_oracle(problem: tuple[_core.LoraFactors, _core.Subspace], preset: str) -> None:
    factors, subspace = problem
    reference = expected(factors, subspace, PRESETS[preset])
    assume(reference.norm() > CANCELLED * dense_update(factors).norm())
    assert oracle.relative_error(dense(correct(factors, subspace, PRESETS[preset])), reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "directions"),
    [
        (4096, 4096, 16, 64),
        (4096, 1024, 256, 512),
        (1024, 4096, 256, 16),
        (8, 4096, 8, 8),
        (4096, 8, 1, 1),
        (512, 2048, 64, 512),  # the subspace is everything on the left
    ],
)
@pytest.mark.parametrize("preset", ["csulora", "project", "protect"])
def test_agrees_with_the_dense_oracle_at_the_extremes(
    rows: int, columns: int, rank: int, directions: int, preset: str
) -> None:
    factors = factories.lora_factors(rows, columns, rank, seed=rank)
    subspace = factories.core_subspace(rows, columns, directions)
    reference = expected(factors, subspace, PRESETS[preset])
    assert oracle.relative_error(dense(correct(factors, subspace, PRESETS[preset])), reference) <= TOLERANCE


@pytest.mark.parametrize("outside", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@every_preset
def test_agrees_where_b_lies_almost_inside_the_subspace(outside: float, preset: str) -> None:
    subspace = factories.core_subspace(300, 200, 24)
    inside = subspace.u @ factories.gaussian(24, 8, seed=1)
    stray = factories.gaussian(300, 8, seed=2)
    b = inside + outside * stray * inside.norm() / stray.norm()
    factors = _core.LoraFactors(b, factories.gaussian(8, 200, seed=3))
    reference = expected(factors, subspace, PRESETS[preset])
    assert oracle.relative_error(dense(correct(factors, subspace, PRESETS[preset])), reference) <= CANCELLED
    kept = correct(factors, subspace, PRESETS[preset], KEEP)
    best = oracle.best_approximation(reference, 8)
    assert float((dense(kept) - best).norm() / reference.norm()) <= CANCELLED


@pytest.mark.parametrize("entry", [1.0, 0.7])
def test_sums_of_equal_terms_lose_no_more_than_others(entry: float) -> None:
    rows, columns = 1024, 64
    mixed = torch.cat([torch.ones(rows, 1), factories.gaussian(rows, 3, seed=1)], 1)
    u, v = torch.linalg.qr(mixed.double())[0].float(), factories.orthonormal(columns, 4).float()
    b = entry + 0.02 * factories.gaussian(rows, 1, seed=2)
    factors = _core.LoraFactors(b, factories.gaussian(1, columns, seed=3))
    subspace = _core.Subspace(u, torch.ones(4), v)
    whole = expected(factors, subspace, PRESETS["remove"])
    assert oracle.relative_error(dense(correct(factors, subspace, PRESETS["remove"])), whole) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_the_result_once_to_the_storage_type_of_the_input(dtype: torch.dtype) -> None:
    factors = factories.lora_factors(120, 90, 6, dtype=dtype)
    subspace = factories.core_subspace(120, 90, 12, dtype=dtype)
    reference = expected(factors, subspace, PRESETS["csulora"])
    result = correct(factors, subspace, PRESETS["csulora"])
    assert (result.factors.b.dtype, result.factors.a.dtype) == (dtype, dtype)
    assert oracle.relative_error(dense(result), reference) <= STORED[dtype]


@given(problem=problems())
def test_energies_norm_and_undo_agree_with_the_oracle(problem: tuple[_core.LoraFactors, _core.Subspace]) -> None:
    factors, subspace = problem
    update = dense_update(factors)
    result = correct(factors, subspace, PRESETS["csulora"])
    energies = {name: getattr(result.energies, name) for name in oracle.COMPONENTS}
    assert energies == pytest.approx(oracle.split(update, subspace.u, subspace.v).energies, abs=TRACES)
    assert sum(energies.values()) == pytest.approx(1.0, abs=1e-12)
    assert result.norm == pytest.approx(float(update.norm()), rel=TRACES)
    reference = oracle.undo(update, subspace.u, subspace.s, subspace.v)
    assert result.undo == pytest.approx(reference, abs=TRACES * float(update.norm() / subspace.s.norm()))


@given(problem=problems(), preset=st.sampled_from(sorted(PRESETS)))
def test_gains_and_change_follow_from_the_energies(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str
) -> None:
    factors, subspace = problem
    result = correct(factors, subspace, PRESETS[preset])
    energies = {name: getattr(result.energies, name) for name in oracle.COMPONENTS}
    gains = {name: getattr(result.gains, name) for name in oracle.COMPONENTS}
    assert gains == pytest.approx(oracle.gains(PRESETS[preset], energies), rel=1e-12)
    relative_change2 = sum((1 - gains[name]) ** 2 * energies[name] for name in oracle.COMPONENTS)
    assert result.relative_change == pytest.approx(math.sqrt(relative_change2), abs=1e-12)


@given(problem=problems())
def test_none_returns_the_update_itself(problem: tuple[_core.LoraFactors, _core.Subspace]) -> None:
    factors, subspace = problem
    result = correct(factors, subspace, PRESETS["none"], KEEP)
    torch.testing.assert_close(result.factors.b, factors.b * factors.scale, rtol=0, atol=0)
    torch.testing.assert_close(result.factors.a, factors.a, rtol=0, atol=0)
    assert result.relative_change == 0
    assert result.truncation_error == 0


@given(problem=problems())
def test_project_is_idempotent(problem: tuple[_core.LoraFactors, _core.Subspace]) -> None:
    factors, subspace = problem
    once = correct(factors, subspace, PRESETS["project"])
    twice = correct(once.factors, subspace, PRESETS["project"])
    assert oracle.relative_error(dense(twice), dense(once)) <= PROJECTOR[torch.float32]
    assert twice.energies.aligned == pytest.approx(1.0, abs=PROJECTOR[torch.float32])


@given(
    problem=problems(),
    penalties=st.tuples(*[st.floats(0, 100)] * 3),
    seed=st.integers(0, 1000),
)
def test_no_perturbation_costs_less(
    problem: tuple[_core.LoraFactors, _core.Subspace], penalties: Penalties, seed: int
) -> None:
    factors, subspace = problem
    update = dense_update(factors)
    best = dense(correct(factors, subspace, penalties))
    direction = factories.gaussian(*update.shape, seed=seed).double()
    step = 1e-2 * update.norm() / direction.norm() * direction
    cost = oracle.objective(best, update, subspace.u, subspace.v, penalties)
    for sign in (-1, 1):
        assert oracle.objective(best + sign * step, update, subspace.u, subspace.v, penalties) > cost


@given(problem=problems(), preset=st.sampled_from(sorted(PRESETS)), seed=st.integers(0, 1000))
def test_only_the_product_of_the_factors_matters(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, seed: int
) -> None:
    factors, subspace = problem
    rank = factors.a.shape[0]
    mix = factories.orthonormal(rank, rank, seed) * torch.logspace(-0.5, 0.5, rank, dtype=torch.float64)
    mixed = _core.LoraFactors(
        (factors.b.double() @ mix).float(), (mix.inverse() @ factors.a.double()).float(), factors.scale
    )
    plain = dense(correct(factors, subspace, PRESETS[preset]))
    assume(plain.norm() > CANCELLED * dense_update(factors).norm())
    assert oracle.relative_error(dense(correct(mixed, subspace, PRESETS[preset])), plain) <= 10 * TOLERANCE


@given(problem=problems(), preset=st.sampled_from(sorted(PRESETS)), factor=st.sampled_from([-3.0, 1e-4, 1e4]))
def test_scaling_the_update_scales_the_result(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, factor: float
) -> None:
    factors, subspace = problem
    scaled = _core.LoraFactors(factors.b, factors.a, factor * factors.scale)
    plain, result = (correct(p, subspace, PRESETS[preset]) for p in (factors, scaled))
    assume(dense(plain).norm() > CANCELLED * dense_update(factors).norm())
    assert oracle.relative_error(dense(result), factor * dense(plain)) <= TOLERANCE
    assert result.energies.aligned == pytest.approx(plain.energies.aligned, abs=TRACES)
    rounding = TRACES * result.norm / float(subspace.s.norm())
    assert result.undo == pytest.approx(factor * plain.undo, abs=rounding)


@given(problem=problems(), preset=st.sampled_from(["csulora", "protect", "uneven"]), cut=st.floats(0, 1))
def test_a_lower_rank_is_the_best_approximation(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, cut: float
) -> None:
    factors, subspace = problem
    rank = factors.a.shape[0]
    target = max(1, round(cut * 2 * rank))
    whole = expected(factors, subspace, PRESETS[preset])
    result = correct(factors, subspace, PRESETS[preset], _core.CorrectionOptions(_core.RankRule.fixed, target))
    values = oracle.singular_values(whole, 2 * rank)
    total = float(values.square().sum())
    best = float(values[target:].square().sum()) / total
    assert result.factors.a.shape[0] <= target
    assert float((dense(result) - whole).square().sum()) / total == pytest.approx(best, abs=TRACES)
    if result.factors.a.shape[0] == target:
        assert result.truncation_error == pytest.approx(best, abs=TRACES)


@given(problem=problems())
def test_keep_has_the_rank_of_the_input(problem: tuple[_core.LoraFactors, _core.Subspace]) -> None:
    factors, subspace = problem
    result = correct(factors, subspace, PRESETS["csulora"], KEEP)
    assert result.factors.b.shape == factors.b.shape
    assert result.factors.a.shape == factors.a.shape
    whole = expected(factors, subspace, PRESETS["csulora"])
    truncation_error = float((dense(result) - whole).square().sum() / whole.square().sum())
    assert truncation_error == pytest.approx(result.truncation_error, abs=TRACES)


@given(problem=problems(), gains=st.tuples(*[st.floats(0, 1)] * 4))
@example(problem=(factories.lora_factors(40, 30, 4), factories.core_subspace(40, 30, 6)), gains=(0.0, 0.0, 0.0, 0.0))
@example(problem=(factories.lora_factors(40, 30, 4), factories.core_subspace(40, 30, 6)), gains=(0.0, 1.0, 0.0, 0.0))
@example(problem=(factories.lora_factors(40, 30, 4), factories.core_subspace(40, 30, 6)), gains=(0.5, 1.0, 0.25, 0.5))
def test_four_gains_are_applied_as_they_are(
    problem: tuple[_core.LoraFactors, _core.Subspace], gains: tuple[float, float, float, float]
) -> None:
    factors, subspace = problem
    components = oracle.split(dense_update(factors), subspace.u, subspace.v)
    whole = oracle.combine(components, dict(zip(oracle.COMPONENTS, gains, strict=True)))
    error = (dense(correct(factors, subspace, _core.Components(*gains))) - whole).norm()
    assert float(error) <= TOLERANCE * float(components.update.norm())


def test_undo_of_a_removed_alignment_is_the_share_removed() -> None:
    subspace = factories.core_subspace(60, 50, 8)
    for share in (1.0, 0.3, -0.5):
        factors = _core.LoraFactors(-share * subspace.u * subspace.s, subspace.v.t().contiguous())
        result = correct(factors, subspace, PRESETS["csulora"])
        assert result.undo == pytest.approx(share, abs=TRACES)
        assert result.energies.aligned == pytest.approx(1.0, abs=TRACES)


@given(problem=problems(), preset=st.sampled_from(sorted(PRESETS)), cut=st.floats(0.01, 1))
def test_undo_after_agrees_with_the_oracle_at_any_rank(
    problem: tuple[_core.LoraFactors, _core.Subspace], preset: str, cut: float
) -> None:
    factors, subspace = problem
    target = max(1, round(cut * 2 * factors.a.shape[0]))
    rounding = TRACES * float(dense_update(factors).norm() / subspace.s.norm())
    for options in (EXACT, KEEP, _core.CorrectionOptions(_core.RankRule.fixed, target)):
        result = correct(factors, subspace, PRESETS[preset], options)
        reference = oracle.undo(dense(result), subspace.u, subspace.s, subspace.v)
        assert result.undo_after == pytest.approx(reference, abs=rounding)


@given(problem=problems())
def test_undo_stays_where_everything_is_kept_and_goes_with_the_aligned_component(
    problem: tuple[_core.LoraFactors, _core.Subspace],
) -> None:
    factors, subspace = problem
    kept = correct(factors, subspace, PRESETS["none"], KEEP)
    assert kept.undo_after == kept.undo
    assert correct(factors, subspace, PRESETS["remove"], EXACT).undo_after == 0


def test_an_update_of_zero_stays_zero() -> None:
    zero = _core.LoraFactors(torch.zeros(20, 3), factories.gaussian(3, 16, seed=0))
    for options in (EXACT, KEEP, _core.CorrectionOptions(_core.RankRule.fixed, 1)):
        result = correct(zero, factories.core_subspace(20, 16, 4), PRESETS["uneven"], options)
        assert dense(result).norm() == 0
        assert (result.norm, result.relative_change, result.truncation_error) == (0, 0, 0)
        assert (result.undo, result.undo_after) == (0, 0)


def test_an_empty_subspace_leaves_everything_off() -> None:
    factors = factories.lora_factors(20, 16, 3)
    empty = _core.Subspace(torch.empty(20, 0), torch.empty(0), torch.empty(16, 0))
    result = correct(factors, empty, (0.0, 0.0, 1.0))
    assert result.energies.off == 1
    assert oracle.relative_error(dense(result), 0.5 * dense_update(factors)) <= TOLERANCE


def test_bits_depend_neither_on_the_batch_nor_on_the_number_of_threads(
    restore_threads: None,
) -> None:
    problems_ = [(factories.lora_factors(300, 200, 16, i), factories.core_subspace(300, 200, 24, i)) for i in range(5)]
    tasks = [
        _core.CorrectionTask(p, s, _core.Penalties(*PRESETS["uneven"]), str(i)) for i, (p, s) in enumerate(problems_)
    ]
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        together = _core.correct(tasks)
        alone = [_core.correct([task])[0] for task in tasks]
        results[threads] = [*together, *alone]
    reference = results[1][: len(tasks)]
    for batch in results.values():
        for i, result in enumerate(batch):
            assert torch.equal(result.factors.b, reference[i % len(tasks)].factors.b)
            assert torch.equal(result.factors.a, reference[i % len(tasks)].factors.a)
            assert result.undo == reference[i % len(tasks)].undo


def _pair(b: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> Callable[[], _core.Correction]:
    return lambda: correct(_core.LoraFactors(b, a, scale), factories.core_subspace(20, 16, 4), PRESETS["csulora"])


def _numbers(attenuation: Penalties | _core.Components) -> Callable[[], _core.Correction]:
    return lambda: correct(factories.lora_factors(20, 16, 3), factories.core_subspace(20, 16, 4), attenuation)


def _subspace(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> Callable[[], _core.Correction]:
    return lambda: correct(factories.lora_factors(20, 16, 3), _core.Subspace(u, s, v), PRESETS["csulora"])


B, A = torch.ones(20, 3), torch.ones(3, 16)
U, S, V = factories.orthonormal(20, 4).float(), torch.ones(4), factories.orthonormal(16, 4).float()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_pair(torch.ones(20), A), "dimensions"),
        (_pair(torch.ones(20, 2), A), "inner dimensions"),
        (_pair(torch.ones(20, 0), torch.ones(0, 16)), "at least 1"),
        (_pair(torch.ones(0, 3), A), "at least 1"),
        (_pair(B, torch.ones(3, 0)), "at least 1"),
        (_pair(torch.ones(21, 3), A), "subspace is for"),
        (_pair(B.double(), A), "float16, bfloat16 or float32"),
        (_pair(B.int(), A), "float16, bfloat16 or float32"),
        (_pair(B.to_sparse(), A), "sparse"),
        (_pair(torch.complex(B, B).conj().imag, A), "negated"),
        (_pair(torch.ones(20, 3, device="meta"), A), "CPU"),
        (_pair(B * math.nan, A), "NaN"),
        (_pair(B, A * math.inf), "NaN"),
        (_pair(B * 1e38, A * 1e38, 16.0), "too large"),
        (_pair(B, A, math.inf), "scale"),
        (_subspace(U[:, :3], S, V), "agree on the number"),
        (_subspace(U, S.double(), V), "float32 vector"),
        (_subspace(U, S.to("meta"), V), "one device"),
        (_subspace(U, S, V.to("meta")), "CPU or a GPU"),
        (_subspace(U, S * math.nan, V), "NaN"),
        (_subspace(U * math.inf, S, V), "NaN"),
        (_subspace(U.double(), S, V.double()), "float16, bfloat16 or float32"),
        (_numbers((-1.0, 0.0, 0.0)), "penalty `aligned`"),
        (_numbers((0.0, math.nan, 0.0)), "penalty `partial`"),
        (_numbers(_core.Components(0.0, 0.0, 0.0, 1.5)), "gain `off`"),
        (_numbers(_core.Components(math.nan, 0.0, 0.0, 0.0)), "gain `aligned`"),
    ],
)
def test_what_cannot_be_corrected_is_named(call: Callable[[], _core.Correction], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        call()
    assert str(caught.value).startswith("layer")


def test_the_first_bad_module_is_the_one_reported() -> None:
    bad = _core.LoraFactors(B * math.nan, A)
    subspace = factories.core_subspace(20, 16, 4)
    tasks = [
        _core.CorrectionTask(factors, subspace, _core.Penalties(0, 1, 1), label)
        for label, factors in {"good": factories.lora_factors(20, 16, 3), "first": bad, "second": bad}.items()
    ]
    for _ in range(20):
        with pytest.raises(InputError, match=r"^first"):
            _core.correct(tasks)
