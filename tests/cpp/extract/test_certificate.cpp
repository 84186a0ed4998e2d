// Certificates of directions that stand out and of directions inside a bulk, against dense float64.
#include <ATen/ATen.h>
#include <csulora/extract.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace {

using at::Tensor;

constexpr double kEnergyTolerance = 0.01;
constexpr double kRounding = 1e-6;  // the certificate and the test measure the same factors in another order

struct Case {
  Tensor matrix;  // (m, n) float32
  int64_t rank;
  int64_t signals;  // singular values far above the bulk
};

int64_t draw(std::mt19937_64& generator, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

Tensor orthonormal(int64_t rows, int64_t columns) {
  return std::get<0>(at::linalg_qr(at::randn({rows, columns}, at::kDouble)));
}

/// A random shape, rank and number of signals before the bulk of a Gaussian matrix, or before a falling spectrum.
Case random_case(uint64_t seed) {
  std::mt19937_64 generator(seed);
  at::manual_seed(seed);
  const int64_t rows = draw(generator, 200, 420), columns = draw(generator, 200, 420);
  const int64_t rank = draw(generator, 2, 8), signals = draw(generator, 0, rank + 3);
  const int64_t shorter = std::min(rows, columns);
  auto bulk = at::randn({rows, columns}, at::kDouble).div_(std::sqrt(rows) + std::sqrt(columns));
  if (seed % 3 == 0) {
    const auto values = at::arange(1, shorter + 1, at::kDouble).pow(-0.1 * static_cast<double>(draw(generator, 1, 8)));
    bulk = orthonormal(rows, shorter).mul(values).mm(orthonormal(columns, shorter).t());
  }
  const auto values = at::linspace(static_cast<double>(draw(generator, 3, 40)), 1.3, signals, at::kDouble);
  const auto matrix = bulk + orthonormal(rows, signals).mul(values).mm(orthonormal(columns, signals).t());
  return {matrix.to(at::kFloat), rank, signals};
}

/// What the leading columns of `basis` miss of the leading `count` columns of `truth`.
double missed(const Tensor& truth, const Tensor& basis, int64_t count) {
  const auto [found, triangle] = at::linalg_qr(basis.narrow(1, 0, count).to(at::kDouble));
  const auto overlap = truth.narrow(1, 0, count).t().mm(found);
  return 1 - overlap.square().sum().item<double>() / static_cast<double>(count);
}

/// Checks the certificate, and returns whether the Krylov method made it.
bool check_certificate(const Case& chosen, const csulora::ExtractOptions& options) {
  const auto found = csulora::extract_subspace(at::zeros_like(chosen.matrix), chosen.matrix, options);
  const auto& certificate = found.certificate;
  const auto dense = chosen.matrix.to(at::kDouble);
  const auto [u, s, vt] = at::linalg_svd(dense, false);
  const int64_t k = found.s.size(0);
  REQUIRE(k == chosen.rank);
  const double norm2 = dense.square().sum().item<double>();
  const double optimum = s.narrow(0, 0, k).square().sum().item<double>() / norm2;
  const auto rebuilt = found.u.to(at::kDouble).mul(found.s).mm(found.v.to(at::kDouble).t());
  const double captured = 1 - dense.sub(rebuilt).square().sum().item<double>() / norm2;
  CHECK(certificate.captured_energy <= captured + kRounding);
  CHECK(certificate.optimal_share <= captured / optimum + kRounding);
  CHECK(certificate.optimal_share >= 1 - 1.5 * kEnergyTolerance);
  CHECK(certificate.next_value >= s[k].item<double>() * (1 - kRounding));
  const int64_t standing_out = certificate.standing_out;
  REQUIRE(standing_out <= k);
  if (standing_out == 0) {
    CHECK(certificate.subspace_error == 1);
  } else {
    CHECK(missed(u, found.u, standing_out) <= certificate.subspace_error + kRounding);
    CHECK(missed(vt.t(), found.v, standing_out) <= certificate.subspace_error + kRounding);
  }
  return certificate.passes > 0;
}

}  // namespace

TEST_CASE("certificates are never optimistic, before a gap and inside a bulk") {
  int searched = 0;
  for (uint64_t seed = 0; seed < 360; ++seed) {
    CAPTURE(seed);
    const auto chosen = random_case(seed);
    csulora::ExtractOptions options;
    options.rank = chosen.rank;
    options.seed = seed;
    options.energy_tolerance = kEnergyTolerance;
    options.factor_dtype = seed % 2 == 0 ? at::kHalf : at::kFloat;
    searched += check_certificate(chosen, options) ? 1 : 0;
  }
  CHECK(searched >= 300);
}

TEST_CASE("a direction that half precision holds does not make a certificate optimistic") {
  constexpr int64_t kSize = 256;  // of constant unit vectors, whose entries 1/16 are not rounded
  at::manual_seed(4);
  const auto basis = [] {
    const auto others = at::randn({kSize, 11}, at::kDouble);
    return std::get<0>(at::linalg_qr(at::cat({at::ones({kSize, 1}, at::kDouble), others}, 1)));
  };
  const auto matrix = basis().mul(at::arange(12, 0, -1, at::kDouble)).mm(basis().t()).to(at::kFloat);
  for (const auto& dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    csulora::ExtractOptions options;
    options.rank = 4;
    options.factor_dtype = dtype;
    CHECK(check_certificate({matrix, 4, 4}, options));
  }
}

TEST_CASE("signals before a bulk stand out, and what is certified of a bulk alone is right") {
  at::manual_seed(1);
  const auto bulk = at::randn({400, 300});
  const auto signals =
      orthonormal(400, 3).mul(at::tensor({120.0, 100.0, 80.0}, at::kDouble)).mm(orthonormal(300, 3).t());
  csulora::ExtractOptions options;
  options.rank = 8;
  const auto base = at::zeros({400, 300});
  const auto mixed = csulora::extract_subspace(base, bulk + signals.to(at::kFloat), options).certificate;
  CHECK(mixed.standing_out == 3);
  CHECK(mixed.subspace_error <= 1e-3);
  CHECK(mixed.optimal_share >= 0.98);
  const auto alone = csulora::extract_subspace(base, bulk, options);
  const int64_t certified = alone.certificate.standing_out;
  const auto leading = std::get<0>(at::linalg_svd(bulk.to(at::kDouble), false)).narrow(1, 0, certified);
  const auto found = alone.u.narrow(1, 0, certified).to(at::kDouble);
  const double missed = static_cast<double>(certified) - leading.t().mm(found).square().sum().item<double>();
  CHECK(certified < 8);
  CHECK(missed <= static_cast<double>(certified) * alone.certificate.subspace_error);
  CHECK(alone.certificate.optimal_share >= 0.98);
  CHECK(csulora::certify(base, bulk, alone, options, 2).standing_out == 2);
}

TEST_CASE("a rank may be whatever stands out of the bulk") {
  at::manual_seed(2);
  const auto bulk = at::randn({400, 300});
  const auto signals =
      orthonormal(400, 3).mul(at::tensor({120.0, 100.0, 80.0}, at::kDouble)).mm(orthonormal(300, 3).t());
  const auto base = at::zeros({400, 300});
  csulora::ExtractOptions options;
  options.above_bulk = true;
  for (const int64_t most : {2, 8, 200}) {  // the last one by a full decomposition
    options.rank = most;
    CHECK(csulora::extract_subspace(base, bulk + signals.to(at::kFloat), options).s.size(0) ==
          std::min<int64_t>(most, 3));
    CHECK(csulora::extract_subspace(base, bulk, options).s.size(0) == 0);
  }
  const auto values = at::arange(1, 301, at::kDouble).pow(-0.5);  // falls without a bulk
  const auto falling = orthonormal(400, 300).mul(values).mm(orthonormal(300, 300).t()).to(at::kFloat);
  options.rank = 8;
  CHECK(csulora::extract_subspace(base, falling, options).s.size(0) == 8);
}

TEST_CASE("without an energy tolerance every direction converges by residual") {
  at::manual_seed(2);
  const auto bulk = at::randn({500, 400});
  csulora::ExtractOptions loose;
  loose.rank = 4;
  loose.factor_dtype = at::kFloat;
  auto strict = loose;
  strict.energy_tolerance = 0;
  const auto base = at::zeros_like(bulk);
  const auto quick = csulora::extract_subspace(base, bulk, loose).certificate;
  const auto slow = csulora::extract_subspace(base, bulk, strict).certificate;
  CHECK(slow.residual <= strict.tolerance);
  CHECK(quick.residual <= 5 * loose.energy_tolerance);
  CHECK((slow.passes == 0 || quick.passes < slow.passes));
}
