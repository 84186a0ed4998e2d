// Products of factors with few rows and a matrix, whose kernels take it in tiles: shapes that no tile divides.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "linalg/products.h"

namespace {

using at::Tensor;

/// Checks the product with a matrix (m, n), which is contiguous or the transpose of such a one.
void check_product(int64_t b, const Tensor& matrix, at::ScalarType sums, double tolerance) {
  const auto rows = at::randn({b, matrix.size(0)});
  const auto out = at::full({b, matrix.size(1)}, NAN, sums);
  csulora::multiply(out, rows, matrix);
  const auto exact = rows.to(at::kDouble).mm(matrix.to(at::kDouble));
  CAPTURE(b);
  CAPTURE(matrix.sizes());
  CHECK((out - exact).norm().item<double>() <= tolerance * exact.norm().item<double>());
}

}  // namespace

TEST_CASE("a product is as accurate as its sums, whatever the shape") {
  at::manual_seed(0);
  for (const int64_t b : {1, 3, 32, 65}) {
    for (const auto& [m, n] : {std::pair{1, 1}, {7, 15}, {8, 16}, {64, 64}, {65, 129}, {515, 83}, {1030, 200}}) {
      const auto matrix = at::randn({m, n});
      check_product(b, matrix, at::kFloat, 2e-6);
      check_product(b, matrix.t(), at::kFloat, 2e-6);
      check_product(b, matrix, at::kDouble, 1e-6);
      check_product(b, matrix.t(), at::kDouble, 1e-6);
    }
  }
}

TEST_CASE("equal terms cost sums in float64 no more digits than short sums in float32 lose") {
  const int64_t terms = 20000;
  const auto rows = at::full({2, terms}, 0.1F), matrix = at::full({terms, 70}, 0.3F);
  const auto exact = rows.to(at::kDouble).mm(matrix.to(at::kDouble));
  const double tolerance = csulora::kFloatTerms / 2 * 0x1p-24;
  for (const auto& factor : {matrix, matrix.t().contiguous().t()}) {
    const auto out = at::empty({2, 70}, at::kDouble);
    csulora::multiply(out, rows, factor);
    CHECK((out / exact - 1).abs().max().item<double>() <= tolerance);
  }
}
