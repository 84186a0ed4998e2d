"""Extraction against known spectra, and certificates against the truth."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import devices
import factories
import oracle
from csulora.errors import InputError
from csulora.native import _core


def extract(base: Tensor, aligned: Tensor, **options: object) -> devices.Extracted:
    chosen = _core.ExtractOptions()
    for name, value in options.items():
        setattr(chosen, name, value)
    return devices.extract(base, aligned, chosen)


def extract_displacement(displacement: Tensor, **options: object) -> devices.Extracted:
    return extract(torch.zeros_like(displacement, dtype=torch.float32), displacement.float(), **options)


def subspace_error(true: Tensor, found: Tensor) -> float:
    """1 - |true^T found|_F^2 / k for orthonormal (n, k) `true` and the span of `found`."""
    basis, _ = torch.linalg.qr(found.double())
    return 1 - float((true.double().t() @ basis).square().sum()) / true.shape[1]


SIGNALS = 24
SPECTRA = {
    "i^-0.5": lambda n: torch.arange(1, n + 1).double().rsqrt(),
    "i^-1": lambda n: torch.arange(1, n + 1).double().reciprocal(),
    "signal and noise floor": lambda n: torch.cat(
        [torch.linspace(1, 0.2, SIGNALS).double(), torch.linspace(0.05, 0.005, n - SIGNALS).double()]
    ),
}


@pytest.mark.parametrize("size", [1024, 2048, 4096])
@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_finds_the_leading_subspace_where_every_direction_converges(size: int, spectrum: str) -> None:
    values = SPECTRA[spectrum](size)
    left, right = factories.cosines(size), factories.cosines(size).flip(0)
    displacement = (left * values.float()) @ right.t()
    for rank in (16, 64):
        found = extract_displacement(displacement, rank=rank, energy_tolerance=0.0)
        optimum = float(values[:rank].square().sum() / values.square().sum())
        assert found.u.dtype == torch.float16
        assert found.certificate.captured_energy >= 0.9999 * optimum
        if values[rank - 1] / values[rank] >= 1.01:
            assert subspace_error(left[:, :rank], found.u) <= 1e-3
            assert subspace_error(right[:, :rank], found.v) <= 1e-3


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_default_settings_capture_the_energy(spectrum: str) -> None:
    values = SPECTRA[spectrum](1500)
    found = extract_displacement(factories.with_spectrum(1500, 1500, values).float(), rank=40).certificate
    optimum = float(values[:40].square().sum() / values.square().sum())
    assert found.captured_energy >= 0.99 * optimum
    assert 0.985 <= found.optimal_share <= found.captured_energy / optimum + ROUNDING


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The certificate and the test measure the same factors in float64, in another order.
ROUNDING = 1e-6


def assert_honest(displacement: Tensor, found: devices.Extracted) -> None:
    """Nothing that the certificate says is better than a dense float64 decomposition of the same matrix finds."""
    u, s, v, certificate = found.u.double(), found.s.double(), found.v.double(), found.certificate
    dense, rank = displacement.double(), found.s.shape[0]
    norm2 = float(dense.square().sum())
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    assert certificate.displacement_norm2 == pytest.approx(norm2, rel=ROUNDING)
    assert rank == len(values) or float(values[rank]) <= certificate.next_value
    assert certificate.above_noise <= int((values > certificate.noise_edge).sum())
    if rank == 0:
        assert (certificate.captured_energy, certificate.subspace_error) == (0, 1)
        return
    residuals = torch.maximum((dense @ v - u * s).norm(dim=0), (dense.t() @ u - v * s).norm(dim=0)) / s
    assert float(residuals.max()) <= certificate.residual * (1 + ROUNDING)
    assert 1 - float((dense - (u * s) @ v.t()).square().sum()) / norm2 >= certificate.captured_energy - ROUNDING
    identity = torch.eye(rank, dtype=torch.float64)
    worst = max(float((basis.t() @ basis - identity).norm()) for basis in (u, v))
    assert worst <= certificate.orthonormality * (1 + ROUNDING)
    captured = 1 - float((dense - (u * s) @ v.t()).square().sum()) / norm2
    assert certificate.optimal_share <= captured * norm2 / float(values[:rank].square().sum()) + ROUNDING
    count = certificate.standing_out
    if count == 0:
        assert certificate.subspace_error == 1
        return
    for true, basis in ((left[:, :count], found.u[:, :count]), (right[:count].t(), found.v[:, :count])):
        assert subspace_error(true, basis) <= certificate.subspace_error + 1e-12


def random_case(seed: int) -> tuple[Tensor, int]:
    """A random shape, spectrum and rank, so that both the Krylov method and the full decomposition get their share."""
    pick = factories.generator(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=pick))

    rows, columns = 32 * draw(3, 16), 32 * draw(3, 16)
    shorter, rank = min(rows, columns), draw(1, 24)
    decay = 0.25 * draw(1, 8)
    values = torch.arange(1, shorter + 1).double() ** -decay
    if seed % 3 == 0:  # a floor behind a few signals
        values = torch.cat([values[:rank] + 0.2, torch.full((shorter - rank,), 0.05).double()])
    if seed % 5 == 0:  # a gap that is hardly there
        values[rank] = values[rank - 1] * 0.999
    return factories.with_spectrum(rows, columns, values.sort(descending=True).values, seed % 4).float(), rank


@pytest.mark.parametrize("chunk", range(10))
def test_certificates_are_never_optimistic(chunk: int) -> None:
    for seed in range(chunk * 24, chunk * 24 + 24):
        displacement, rank = random_case(seed)
        found = extract_displacement(displacement, rank=rank, factor_dtype=DTYPES[seed % 3], seed=seed)
        assert found.s.shape[0] == rank
        assert_honest(displacement, found)


def _with_values(change: Callable[[Tensor, int], None]) -> Callable[[int, int, int], Tensor]:
    """A matrix with singular values 1/i after a change that is told the rank."""

    def make(rows: int, columns: int, rank: int) -> Tensor:
        values = torch.arange(1, min(rows, columns) + 1).double().reciprocal()
        change(values, rank)
        return factories.with_spectrum(rows, columns, values.sort(descending=True).values)

    return make


def _assign(chosen: Callable[[int], slice], value: Callable[[Tensor, int], Tensor | float]) -> object:
    def change(values: Tensor, rank: int) -> None:
        values[chosen(rank)] = value(values, rank)

    return _with_values(change)


def _noise_behind_signals(rows: int, columns: int, rank: int) -> Tensor:
    noise = factories.gaussian(rows, columns, seed=5).double()
    edge = rows**0.5 + columns**0.5
    return noise + factories.with_spectrum(rows, columns, edge * torch.linspace(4, 1.3, rank).double())


def _outlier(rows: int, columns: int, rank: int) -> Tensor:
    matrix = factories.gaussian(rows, columns, seed=6).double()
    matrix[3, 5] = 1e6
    return matrix


def _equal_entries(rows: int, columns: int, rank: int) -> Tensor:
    """Sums of equal terms, whose rounding adds up; (u, v) of half precision can be exact."""
    return torch.full((rows, columns), 0.9).double()


ADVERSARIAL = {
    "equal entries": _equal_entries,
    "pure noise": lambda rows, columns, rank: factories.gaussian(rows, columns, seed=4).double(),
    "signals in noise": _noise_behind_signals,
    "one huge entry": _outlier,
    "gap of 1.001": _assign(lambda k: slice(k, k + 1), lambda values, k: values[k - 1] / 1.001),
    "cluster at the top": _assign(lambda k: slice(0, 3 * k + 40), lambda values, k: 1.0),
    "cluster across the cut": _assign(lambda k: slice(k - 1, k + 60), lambda values, k: float(values[k])),
    "cluster below the cut": _assign(lambda k: slice(k, k + 120), lambda values, k: float(values[k])),
    "far step": _assign(lambda k: slice(k, None), lambda values, k: 1e-3 * values[k:]),
    "rank k": _assign(lambda k: slice(k, None), lambda values, k: 0.0),
    "rank k/2": _assign(lambda k: slice((k + 1) // 2, None), lambda values, k: 0.0),
    "rank 2k": _assign(lambda k: slice(2 * k, None), lambda values, k: 0.0),
}


@pytest.mark.parametrize("kind", sorted(ADVERSARIAL))
@pytest.mark.parametrize("shape", [(320, 320), (1500, 200), (200, 1500), (160, 150), (1024, 1024)])
def test_certificates_of_adversarial_matrices_are_never_optimistic(shape: tuple[int, int], kind: str) -> None:
    for rank, dtype in ((1, torch.float32), (4, torch.float16), (8, torch.float32), (16, torch.bfloat16)):
        displacement = ADVERSARIAL[kind](*shape, rank).float()
        found = extract_displacement(displacement, rank=rank, keep_noise=True, factor_dtype=dtype)
        assert_honest(displacement, found)
        values = torch.linalg.svdvals(displacement.double())
        present = int((values[:rank] > 1e-6 * values[0]).sum())
        assert present <= found.s.shape[0] <= rank
        optimum = float(values[: found.s.shape[0]].square().sum() / values.square().sum())
        # Rounding to the storage type adds its square to what is not captured.
        assert found.certificate.captured_energy >= 0.99 * optimum - {torch.float32: 1e-6, torch.float16: 1e-5}.get(
            dtype, 1e-4
        )


@pytest.mark.parametrize("options", [{"energy": 0.5}, {"noise_std": 0.004}, {"energy": 0.9, "noise_std": 0.002}])
@pytest.mark.parametrize("shape", [(400, 450), (90, 80)])
def test_certificates_hold_where_energy_or_noise_cut_the_rank(
    shape: tuple[int, int], options: dict[str, float]
) -> None:
    displacement = factories.with_spectrum(*shape, SPECTRA["i^-1"](min(shape))).float()
    found = extract_displacement(displacement, rank=24, factor_dtype=torch.float32, **options)
    assert 0 < found.s.shape[0] < 24
    assert_honest(displacement, found)
    # The first direction that was left out is the next one, not the one after `rank`.
    next_value = float(torch.linalg.svdvals(displacement.double())[found.s.shape[0]])
    assert found.certificate.next_value == pytest.approx(next_value, rel=0.05)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 1e36])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale_is_decomposed(dtype: torch.dtype, size: float) -> None:
    displacement = (factories.gaussian(300, 200, seed=0).double() * size).float()
    found = extract_displacement(displacement, rank=2, keep_noise=True, factor_dtype=dtype)
    assert_honest(displacement, found)
    assert float(found.s[0]) == pytest.approx(float(torch.linalg.svdvals(displacement.double())[0]), rel=1e-4)


@pytest.mark.parametrize("fall", [1e-5, 1e-1])
def test_a_matrix_of_few_entries_is_decomposed(fall: float) -> None:
    """Its Krylov space is soon exhausted, and what fills a block up may be in the space already."""
    values = torch.zeros(200)
    values[:2] = torch.tensor([1.0, 1e-5])
    if fall > 1e-5:
        values[1:30] = 1e-5 * torch.logspace(0, -29, 30)[1:]
    displacement = torch.diag(values)
    found = extract_displacement(displacement, rank=2, keep_noise=True)
    assert_honest(displacement, found)
    assert found.certificate.orthonormality <= ROUNDING
    assert found.certificate.subspace_error <= ROUNDING


@pytest.mark.parametrize("size", [2.0**-45, 2.0**-33, 2.0**33, 2.0**45])
def test_small_and_large_matrices_converge_alike(size: float) -> None:
    values = torch.arange(1, 301).double().rsqrt()
    ordinary = factories.with_spectrum(500, 300, values).float()
    found, scaled = (extract_displacement(matrix, rank=8, keep_noise=True) for matrix in (ordinary, ordinary * size))
    assert scaled.certificate.passes == found.certificate.passes
    assert scaled.certificate.next_value == pytest.approx(size * found.certificate.next_value, rel=ROUNDING)


def test_certificates_say_something_where_there_is_a_gap() -> None:
    values = torch.cat([torch.ones(8), torch.full((392,), 0.1)]).double()
    found = extract_displacement(factories.with_spectrum(400, 500, values), rank=8, factor_dtype=torch.float32)
    assert found.certificate.subspace_error <= 1e-4
    assert found.certificate.residual <= 1e-3


def test_small_matrices_get_an_exact_decomposition() -> None:
    displacement = factories.gaussian(60, 40, seed=0)
    found = extract_displacement(displacement, rank=10, factor_dtype=torch.float32)
    u, s, v = torch.linalg.svd(displacement.double(), full_matrices=False)
    assert found.certificate.passes == 0
    torch.testing.assert_close(found.s.double(), s[:10], rtol=1e-5, atol=0)
    assert subspace_error(u[:, :10], found.u) <= 1e-9
    assert subspace_error(v[:10].t(), found.v) <= 1e-9


@pytest.mark.parametrize("shape", [(900, 700), (50, 40)])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_energy_takes_the_fewest_directions(shape: tuple[int, int], energy: float) -> None:
    values = 0.8 ** torch.arange(min(shape)).double()
    shares = values.square().cumsum(0) / values.square().sum()
    needed = int((shares < energy).sum()) + 1
    found = extract_displacement(factories.with_spectrum(*shape, values), rank=32, energy=energy)
    assert found.s.shape[0] == needed
    assert found.certificate.captured_energy == pytest.approx(float(shares[needed - 1]), abs=1e-3)


def test_energy_stops_at_the_largest_rank() -> None:
    found = extract_displacement(factories.gaussian(300, 300, seed=0), rank=5, energy=0.99)
    assert found.s.shape[0] == 5


def test_a_rank_beyond_the_matrix_means_all_of_it() -> None:
    found = extract_displacement(factories.gaussian(20, 12, seed=0), rank=64)
    assert found.s.shape[0] == 12
    assert found.certificate.captured_energy == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spacings", [1 / 8, 1 / 64])
def test_rounding_noise_is_no_signal(spacings: float, dtype: torch.dtype) -> None:
    """Weights that moved by far less than the spacing of their storage type: what is left is which way they rounded."""
    weights = factories.gaussian(512, 640, seed=0)
    nudged = weights * (1 + torch.finfo(dtype).eps * spacings * factories.gaussian(512, 640, seed=1))
    base, aligned = weights.to(dtype), nudged.to(dtype)
    found = extract(base, aligned, rank=16)
    assert found.certificate.displacement_norm2 > 0
    assert found.s.shape[0] == 0
    assert extract(base, aligned, rank=16, keep_noise=True).s.shape[0] == 16


SCALES = {
    "even": lambda rows, columns: torch.ones(1),
    "larger rows": lambda rows, columns: torch.where(torch.arange(rows) < 2, 30.0, 1.0).unsqueeze(1),
    "larger columns": lambda rows, columns: torch.where(torch.arange(columns) < 2, 30.0, 1.0),
    "every row another": lambda rows, columns: factories.gaussian(rows, 1, seed=3).exp(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", sorted(SCALES))
@pytest.mark.parametrize("shape", [(64, 64), (100, 1500), (700, 400)])
def test_the_noise_edge_lies_closely_above_rounding(shape: tuple[int, int], scales: str, dtype: torch.dtype) -> None:
    """Rounded weights whose exact displacement is known: far above the spacing, half of it (the worst), about it."""
    weights = 0.02 * factories.gaussian(*shape, seed=0).double() * SCALES[scales](*shape)
    far = 0.3 * weights * factories.gaussian(*shape, seed=1).double()
    spacing = torch.finfo(dtype).eps * 2.0 ** weights.abs().log2().floor()
    about = spacing * factories.gaussian(*shape, seed=2).double()
    most = 1.7 if min(shape) >= 100 else 1.9
    for exact in (far, spacing / 2, about):
        base, aligned = weights.to(dtype), (weights + exact).to(dtype)
        rounding = float(torch.linalg.svdvals(aligned.double() - base.double() - exact)[0])
        edge = extract(base, aligned, rank=1).certificate.noise_edge
        assert edge / most <= rounding <= edge


@pytest.mark.parametrize("aligned_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 29, 70000])
def test_the_subtraction_sums_what_the_twin_does(
    columns: int, base_dtype: torch.dtype, aligned_dtype: torch.dtype
) -> None:
    """Entries of all magnitudes, zeros and numbers without leading digits among them, in either order of memory."""
    values = factories.gaussian(5, columns, seed=0) * torch.tensor([0.0, 1e-7, 1e-3, 1.0, 1e3]).unsqueeze(1)
    base, aligned = values.to(base_dtype), values.flip(0).to(aligned_dtype)
    for transposed in (base.t().contiguous().t(), base):
        found = extract(transposed, aligned, rank=1).certificate
        assert found.noise_edge == pytest.approx(oracle.noise_edge(base, aligned), rel=ROUNDING)
        norm2 = float((aligned.double() - base.double()).square().sum())
        assert found.displacement_norm2 == pytest.approx(norm2, rel=ROUNDING)


def test_only_directions_above_the_rounding_noise_are_kept() -> None:
    weights = factories.gaussian(600, 500, seed=0)
    signal = factories.with_spectrum(600, 500, torch.tensor([9.0, 7.0, 5.0]).double(), seed=1).float()
    base, aligned = weights.bfloat16(), (weights + signal).bfloat16()
    found = extract(base, aligned, rank=16)
    assert found.s.shape[0] == found.certificate.above_noise == 3
    assert found.certificate.noise_edge < 5
    assert extract(base, aligned, rank=2).s.shape[0] == 2
    assert extract(base, aligned, rank=16, noise_std=1.0).s.shape[0] == 0


@pytest.mark.parametrize("keep_noise", [False, True])
def test_identical_checkpoints_have_an_empty_subspace(keep_noise: bool) -> None:
    weights = factories.gaussian(40, 30, seed=0)
    found = extract(weights, weights, keep_noise=keep_noise)
    assert (found.u.shape, found.s.shape, found.v.shape) == ((40, 0), (0,), (30, 0))
    assert (found.certificate.captured_energy, found.certificate.next_value, found.certificate.subspace_error) == (
        0,
        0,
        1,
    )


def test_an_empty_subspace_is_certified_against_the_first_value() -> None:
    displacement = factories.gaussian(300, 200, seed=0)
    empty = _core.Subspace(torch.empty(300, 0), torch.empty(0), torch.empty(200, 0))
    certificate = devices.certify(torch.zeros(300, 200), displacement, empty)
    first = float(torch.linalg.svdvals(displacement.double())[0])
    assert first <= certificate.next_value <= 1.1 * first
    assert certificate.captured_energy == 0


def test_same_seed_same_bits(restore_threads: None) -> None:
    displacement = factories.with_spectrum(700, 600, SPECTRA["i^-0.5"](600)).float()
    first, second = (extract_displacement(displacement, rank=8, seed=3) for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)
    assert torch.equal(first.s, second.s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_stored_as_asked(dtype: torch.dtype) -> None:
    found = extract_displacement(factories.gaussian(50, 40, seed=0), rank=4, factor_dtype=dtype)
    assert found.u.dtype == found.v.dtype == dtype
    assert found.s.dtype == torch.float32
    assert found.u.is_contiguous()
    assert found.v.is_contiguous()


def test_checkpoints_of_different_storage_types_are_subtracted_in_float32() -> None:
    base, change = factories.gaussian(64, 64, seed=0).bfloat16(), factories.gaussian(64, 64, seed=1)
    found = extract(base, base.float() + change, rank=64, factor_dtype=torch.float32, keep_noise=True)
    rebuilt = (found.u * found.s) @ found.v.t()
    assert float((rebuilt - change).norm() / change.norm()) <= 1e-5


def test_certify_agrees_with_extract_and_sees_damage() -> None:
    displacement = factories.with_spectrum(600, 500, SPECTRA["i^-1"](500)).float()
    base = torch.zeros_like(displacement)
    found = extract(base, displacement, rank=6)
    again = devices.certify(base, displacement, found)
    assert again.captured_energy == pytest.approx(found.certificate.captured_energy, abs=1e-9)
    assert again.residual == pytest.approx(found.certificate.residual, rel=1e-6)
    assert again.next_value == pytest.approx(found.certificate.next_value, rel=0.1)
    damaged = _core.Subspace(found.u.roll(1, 0), found.s, found.v)
    assert devices.certify(base, displacement, damaged).residual > 0.5


W = torch.ones(8, 6)


@pytest.mark.parametrize(
    ("base", "aligned", "options", "reason"),
    [
        (W, torch.ones(8, 7), {}, "same shape"),
        (W, torch.ones(8), {}, "dimensions"),
        (W, W.double(), {}, "float16, bfloat16 or float32"),
        (W, W * math.nan, {}, "NaN"),
        (W * math.inf, W, {}, "NaN"),
        (torch.empty(0, 6), torch.empty(0, 6), {}, "empty"),
        (W, W, {"rank": 0}, "rank"),
        (W, W, {"energy": 0.0}, "energy"),
        (W, W, {"energy": math.nan}, "energy"),
        (W, W, {"tolerance": 1.0}, "tolerance"),
        (W, W, {"noise_std": -1.0}, "noise_std"),
        (W, W, {"factor_dtype": torch.float64}, "factor_dtype"),
    ],
)
def test_what_cannot_be_extracted_is_named(
    base: Tensor, aligned: Tensor, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        extract(base, aligned, **options)


U, S, V = (
    factories.orthonormal(20, 3).float(),
    torch.tensor([3.0, 2.0, 1.0]),
    factories.orthonormal(16, 3).float(),
)


@pytest.mark.parametrize(
    ("u", "s", "v", "reason"),
    [
        (U[:, :2], S, V, "agree on the number"),
        (U.half(), S, V, "one dtype"),
        (U, S.double(), V, "float32 vector"),
        (U, S.flip(0), V, "descending"),
        (U, S * math.nan, V, "finite"),
        (U, torch.tensor([3.0, 2.0, 0.0]), V, "positive"),
        (2 * U, S, V, "columns of u are not orthonormal"),
        (U, S, V * math.nan, "columns of v are not orthonormal"),
        (U, S, V[:, [0, 0, 1]], "columns of v are not orthonormal"),
        (U[:2], S, V, "more directions than dimensions"),
        (U[0], S, V, "dimensions"),
    ],
)
def test_damaged_factors_are_named(u: Tensor, s: Tensor, v: Tensor, reason: str) -> None:
    _core.validate(_core.Subspace(U, S, V))
    with pytest.raises(InputError, match=reason):
        _core.validate(_core.Subspace(u, s, v))


def test_of_many_damaged_factors_the_first_is_named_by_its_label() -> None:
    whole, damaged = _core.Subspace(U, S, V), _core.Subspace(2 * U, S, V)
    _core.validate([("a", whole), ("b", whole)])
    for _ in range(20):
        with pytest.raises(InputError, match=r"^second: the columns of u"):
            _core.validate([("first", whole), ("second", damaged), ("third", damaged)])
