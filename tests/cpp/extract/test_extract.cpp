#include <ATen/ATen.h>
#include <csulora/error.h>
#include <csulora/extract.h>
#include <csulora/subspace.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dense.h"
#include "extract/noise_edge.h"

namespace {

using csulora::ExtractOptions;
using csulora::InputError;
using csulora::Subspace;
using dense::Matrix;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// A displacement whose decomposition is known.
struct Known {
  Matrix u;
  std::vector<double> s;
  Matrix v;

  at::Tensor displacement() const { return dense::tensor(u * dense::diagonal(s) * transposed(v)); }
};

Known falling(int64_t rows, int64_t columns) {
  const int64_t shorter = std::min(rows, columns);
  std::vector<double> values;
  for (int64_t i = 1; i <= shorter; ++i) {
    values.push_back(1.0 / static_cast<double>(i));
  }
  return {dense::orthonormal(rows, shorter, 1), values, dense::orthonormal(columns, shorter, 2)};
}

ExtractOptions options(int64_t rank, at::ScalarType dtype = at::kFloat) {
  ExtractOptions chosen;
  chosen.rank = rank;
  chosen.factor_dtype = dtype;
  return chosen;
}

/// 1 - |true^T found|^2 / k, for the leading columns of `basis` and orthonormal `found`.
double subspace_error(const Matrix& basis, const at::Tensor& found) {
  const int64_t k = found.size(1);
  const auto leading = dense::matrix(dense::tensor(basis, at::kDouble).narrow(1, 0, k));
  const auto overlap = transposed(leading) * dense::matrix(found);
  return 1 - inner(overlap, overlap) / static_cast<double>(k);
}

void check_leading(const Known& known, const Subspace& found, int64_t k) {
  REQUIRE(found.s.size(0) == k);
  double norm2 = 0;
  double captured_energy = 0;
  for (size_t i = 0; i < known.s.size(); ++i) {
    norm2 += known.s[i] * known.s[i];
    captured_energy += static_cast<int64_t>(i) < k ? known.s[i] * known.s[i] : 0;
  }
  for (int64_t i = 0; i < k; ++i) {
    CHECK(found.s[i].item<double>() == doctest::Approx(known.s[i]).epsilon(1e-5));
  }
  const auto& certificate = found.certificate;
  CHECK(subspace_error(known.u, found.u) <= certificate.subspace_error + 1e-6);
  CHECK(subspace_error(known.v, found.v) <= certificate.subspace_error + 1e-6);
  CHECK(certificate.subspace_error < 1e-4);
  CHECK(certificate.residual <= 1e-3);
  CHECK(certificate.orthonormality < 1e-5);
  CHECK(certificate.displacement_norm2 == doctest::Approx(norm2));
  CHECK(certificate.captured_energy == doctest::Approx(captured_energy / norm2));
  CHECK(certificate.next_value >= known.s[k] * (1 - 1e-6));
  CHECK(certificate.next_value <= known.s[k] * 1.1);
}

TEST_CASE("the Krylov method and the full decomposition find the leading triples") {
  struct Shape {
    int64_t rows, columns;
    bool krylov;
  };
  for (const auto& [rows, columns, krylov] :
       {Shape{300, 260, true}, Shape{220, 320, true}, Shape{60, 40, false}, Shape{40, 60, false}}) {
    CAPTURE(rows);
    const auto known = falling(rows, columns);
    const auto found = csulora::extract_subspace(at::zeros({rows, columns}), known.displacement(), options(6));
    CHECK((found.certificate.passes > 0) == krylov);
    check_leading(known, found, 6);
    csulora::validate(found);
  }
}

TEST_CASE("of more equal values than a search starts with columns, none is missed") {
  constexpr int64_t kEqualValues = 36, kRows = 470, kColumns = 460;
  for (const double spread : {0.0, 1e-6, 1e-4, 1e-3}) {
    std::vector<double> values;
    for (int64_t i = 0; i < kColumns; ++i) {
      const auto place = static_cast<double>(i);
      values.push_back(i < kEqualValues ? 2 - spread * place / kEqualValues : 18 / place);
    }
    const Known known{dense::orthonormal(kRows, kColumns, 1), values, dense::orthonormal(kColumns, kColumns, 2)};
    const auto displacement = known.displacement();
    const auto found = csulora::extract_subspace(at::zeros_like(displacement), displacement, options(40));
    REQUIRE(found.s.size(0) == 40);
    CHECK(found.s[kEqualValues - 1].item<double>() == doctest::Approx(2).epsilon(1e-3));
    CHECK(found.s[kEqualValues].item<double>() < 1);
    CHECK(found.certificate.passes > 0);
  }
}

TEST_CASE("factors are stored as asked, and certified as stored") {
  const auto known = falling(60, 40);
  for (const auto dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    const auto found = csulora::extract_subspace(at::zeros({60, 40}), known.displacement(), options(4, dtype));
    CHECK((found.u.scalar_type() == dtype));
    CHECK((found.v.scalar_type() == dtype));
    CHECK((found.s.scalar_type() == at::kFloat));
    const auto u = dense::matrix(found.u);
    const auto s = dense::matrix(found.s.diag());
    const auto v = dense::matrix(found.v);
    const auto displacement = dense::matrix(known.displacement());
    const auto left = displacement * v - u * s;
    const auto right = transposed(displacement) * u - v * s;
    double residual = 0;
    for (int64_t i = 0; i < 4; ++i) {
      for (const auto* side : {&left, &right}) {
        double norm2 = 0;
        for (int64_t j = 0; j < side->rows(); ++j) {
          norm2 += (*side)(j, i) * (*side)(j, i);
        }
        residual = std::max(residual, std::sqrt(norm2) / s(i, i));
      }
    }
    CHECK(found.certificate.residual == doctest::Approx(residual));
    const auto rest = displacement - u * s * transposed(v);
    const double captured_energy = 1 - inner(rest, rest) / inner(displacement, displacement);
    CHECK(found.certificate.captured_energy <= captured_energy * (1 + 1e-9));
    const double rounding = dtype == at::kFloat ? 1e-9 : 1e-5;  // half precision is certified with float32 products
    CHECK(found.certificate.captured_energy >= captured_energy * (1 - rounding));
  }
}

TEST_CASE("memory that is used again holds nothing of what it was used for") {
  csulora::Workspace workspace;
  for (const auto& [rows, columns] : {std::pair{300, 260}, {500, 700}, {60, 40}, {300, 260}}) {
    const auto base = at::randn({rows, columns}), aligned = at::randn({rows, columns});
    const auto expected = csulora::extract_subspace(base, aligned, options(6));
    const auto found = csulora::extract_subspace(base, aligned, options(6), &workspace);
    CHECK(found.u.equal(expected.u));
    CHECK(found.s.equal(expected.s));
    CHECK(found.v.equal(expected.v));
    CHECK(found.certificate.captured_energy == expected.certificate.captured_energy);
    CHECK(workspace.matrix.numel() >= rows * columns);
  }
  CHECK(workspace.matrix.numel() == 500 * 700);
}

TEST_CASE("an energy target takes the fewest directions that reach it") {
  const auto known = falling(50, 40);
  double norm2 = 0;
  for (const double value : known.s) {
    norm2 += value * value;
  }
  for (const double energy : {0.5, 0.9, 0.99}) {
    int64_t needed = 0;
    for (double captured_energy = 0; captured_energy < energy * norm2; ++needed) {
      captured_energy += known.s[needed] * known.s[needed];
    }
    auto chosen = options(40);
    chosen.energy = energy;
    CHECK(csulora::extract_subspace(at::zeros({50, 40}), known.displacement(), chosen).s.size(0) == needed);
  }
}

TEST_CASE("directions below the rounding of the checkpoints are kept only on request") {
  const auto weights = dense::gaussian(120, 90, 3);
  const auto signal =
      dense::orthonormal(120, 2, 4) * dense::diagonal({8, 6}) * transposed(dense::orthonormal(90, 2, 5));
  const auto base = dense::tensor(weights, at::kBFloat16);
  const auto aligned = dense::tensor(weights + signal, at::kBFloat16);
  auto found = csulora::extract_subspace(base, aligned, options(10));
  CHECK(found.s.size(0) == 2);
  CHECK(found.certificate.above_noise == 2);
  CHECK(found.certificate.noise_edge < 6);

  auto all = options(10);
  all.keep_noise = true;
  CHECK(csulora::extract_subspace(base, aligned, all).s.size(0) == 10);
  auto louder = options(10);
  louder.noise_std = 7 / (std::sqrt(120.0) + std::sqrt(90.0));
  found = csulora::extract_subspace(base, aligned, louder);
  CHECK(found.certificate.noise_edge == doctest::Approx(7));
  CHECK(found.s.size(0) == 1);

  const auto same = csulora::extract_subspace(base, base);
  CHECK(same.s.size(0) == 0);
  CHECK(same.certificate.displacement_norm2 == 0);
}

TEST_CASE("the spectral edge is the norm of a large matrix of independent entries") {
  CHECK(csulora::spectral_edge({0, 0}, {0, 0, 0}) == 0);
  const std::vector<double> rows(300, 500.0), columns(500, 300.0);
  CHECK(csulora::spectral_edge(rows, columns) == doctest::Approx(std::sqrt(300.0) + std::sqrt(500.0)).epsilon(1e-6));
  at::manual_seed(5);
  for (const double spread : {0.5, 2.0}) {
    const auto scales =
        (at::rand({400, 1}, at::kDouble) * spread).exp() * (at::rand({1, 700}, at::kDouble) * spread).exp();
    const auto sums = [&](int64_t along) {
      const auto sum = scales.square().sum(along).contiguous();
      return std::vector<double>(sum.const_data_ptr<double>(), sum.const_data_ptr<double>() + sum.numel());
    };
    const auto norm = std::get<1>(at::linalg_svd(scales * at::randn({400, 700}, at::kDouble), false))[0].item<double>();
    CHECK(csulora::spectral_edge(sums(1), sums(0)) == doctest::Approx(norm).epsilon(0.05));
  }
}

TEST_CASE("the same seed gives the same bits") {
  const auto displacement = falling(300, 260).displacement();
  auto chosen = options(6);
  chosen.seed = 5;
  const auto first = csulora::extract_subspace(at::zeros_like(displacement), displacement, chosen);
  const auto second = csulora::extract_subspace(at::zeros_like(displacement), displacement, chosen);
  CHECK(at::equal(first.u, second.u));
  CHECK(at::equal(first.s, second.s));
  CHECK(at::equal(first.v, second.v));
}

TEST_CASE("certify measures anew and believes nothing") {
  const auto displacement = falling(60, 40).displacement();
  const auto base = at::zeros_like(displacement);
  const auto found = csulora::extract_subspace(base, displacement, options(5));
  const auto again = csulora::certify(base, displacement, Subspace{found.u, found.s, found.v});
  CHECK(again.captured_energy == doctest::Approx(found.certificate.captured_energy));
  CHECK(again.residual == doctest::Approx(found.certificate.residual));
  CHECK(again.next_value == doctest::Approx(found.certificate.next_value));
  CHECK(csulora::certify(base, displacement, Subspace{found.u.roll(1, 0), found.s, found.v}).residual > 0.5);
  CHECK_THROWS_WITH_AS(csulora::certify(base.t(), displacement.t(), found), doctest::Contains("subspace is for"),
                       InputError);
}

TEST_CASE("what cannot be extracted is an InputError that says why") {
  const auto w = at::ones({8, 6});
  struct Case {
    at::Tensor base, aligned;
    ExtractOptions options;
    const char* reason;
  };
  auto no_energy = options(1);
  no_energy.energy = 0;
  auto no_tolerance = options(1);
  no_tolerance.tolerance = 0;
  auto no_noise = options(1);
  no_noise.noise_std = kNan;
  const std::vector<Case> cases{
      {{}, w, {}, "base is missing"},
      {w, at::ones({8, 7}), {}, "same shape"},
      {w, at::ones(8), {}, "dimensions"},
      {w, w.to(at::kDouble), {}, "float16, bfloat16 or float32"},
      {w.to_sparse(), w, {}, "sparse"},
      {w, w * kNan, {}, "NaN"},
      {w * 3e38, w * -3e38, {}, "too large"},
      {at::empty({0, 6}), at::empty({0, 6}), {}, "empty"},
      {w, w, options(0), "rank is 0"},
      {w, w, no_energy, "energy"},
      {w, w, no_tolerance, "tolerance"},
      {w, w, no_noise, "noise_std"},
      {w, w, options(1, at::kDouble), "factor_dtype"},
  };
  for (const auto& [base, aligned, chosen, reason] : cases) {
    CAPTURE(reason);
    CHECK_THROWS_WITH_AS(csulora::extract_subspace(base, aligned, chosen), doctest::Contains(reason), InputError);
  }
}

TEST_CASE("validate names the damaged factor") {
  const auto u = dense::tensor(dense::orthonormal(20, 3, 1));
  const auto s = at::arange(3, 0, -1).to(at::kFloat);
  const auto v = dense::tensor(dense::orthonormal(16, 3, 2));
  csulora::validate({u, s, v});
  struct Case {
    Subspace subspace;
    const char* reason;
  };
  const std::vector<Case> cases{
      {{u.narrow(1, 0, 2), s, v}, "agree on the number"},
      {{u.to(at::kHalf), s, v}, "one dtype"},
      {{u, s.to(at::kDouble), v}, "float32 vector"},
      {{u, s.flip(0), v}, "descending"},
      {{u, s * kNan, v}, "finite"},
      {{u, s - 1, v}, "positive"},
      {{2 * u, s, v}, "columns of u are not orthonormal"},
      {{u, s, v * kNan}, "columns of v are not orthonormal"},
      {{u.narrow(0, 0, 2), s, v}, "more directions than dimensions"},
  };
  for (const auto& [subspace, reason] : cases) {
    CAPTURE(reason);
    CHECK_THROWS_WITH_AS(csulora::validate(subspace), doctest::Contains(reason), InputError);
  }
}

}  // namespace
