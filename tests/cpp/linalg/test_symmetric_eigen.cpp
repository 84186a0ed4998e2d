// The small symmetric problems of a correction, beside what they promise: no library has their answer to the last
// digit.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include "linalg/symmetric_eigen.h"

namespace {

using at::Tensor;

constexpr double kTolerance = 1e-14;  // times the number of rows

void check_decomposed(const Tensor& matrix) {
  const int64_t n = matrix.size(0);
  const auto found = csulora::symmetric_eigen(csulora::SmallMatrix(matrix));
  const auto values = at::tensor(found.values, at::kDouble), vectors = found.vectors.tensor();
  const double largest = matrix.abs().max().item<double>(), tolerance = kTolerance * static_cast<double>(n);
  CHECK(values.diff().le(0).all().item<bool>());
  CHECK((vectors.mm(vectors.t()) - at::eye(n, at::kDouble)).abs().max().item<double>() <= tolerance);
  CHECK((vectors.t().mul(values).mm(vectors) - matrix).abs().max().item<double>() <= tolerance * largest);
}

Tensor gram(const Tensor& rows) { return rows.mm(rows.t()); }

}  // namespace

TEST_CASE("symmetric matrices of all sizes are decomposed") {
  at::manual_seed(0);
  for (const int64_t n : {1, 2, 3, 7, 16, 32, 33, 64, 65, 128}) {
    const auto rows = at::randn({n, n}, at::kDouble);
    check_decomposed(rows + rows.t());
    check_decomposed(gram(rows));
    check_decomposed(gram(rows.narrow(1, 0, (n + 1) / 2)));
    check_decomposed(gram(rows * at::logspace(0, -12, n, 10, at::kDouble).unsqueeze(1)));
    check_decomposed(gram(rows * at::logspace(-12, 0, n, 10, at::kDouble).unsqueeze(1)));
    check_decomposed(gram(rows * at::logspace(0, -160, n, 10, at::kDouble).unsqueeze(1)));
    check_decomposed(gram(rows * at::logspace(-160, 0, n, 10, at::kDouble).unsqueeze(1)));
  }
}

TEST_CASE("matrices of few different numbers are decomposed") {
  check_decomposed(at::zeros({6, 6}, at::kDouble));
  check_decomposed(at::eye(6, at::kDouble));
  check_decomposed(at::ones({6, 6}, at::kDouble));
  check_decomposed(at::diag(at::tensor({1.0, 3.0, 2.0}, at::kDouble)));
  check_decomposed(at::block_diag({at::ones({3, 3}, at::kDouble), at::eye(3, at::kDouble)}));
}

TEST_CASE("matrices may be as large or small as numbers are") {
  at::manual_seed(0);
  const auto matrix = gram(at::randn({8, 8}, at::kDouble));
  check_decomposed(1e-300 * matrix);
  check_decomposed(1e300 * matrix);
}
