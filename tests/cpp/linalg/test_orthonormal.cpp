// What the blocks of the Krylov method are made orthonormal with, on any device: all of it is torch's operations.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include "linalg/orthonormal.h"

namespace {

using at::Tensor;

constexpr double kTolerance = 1e-5;  // float32

double orthonormality_error(const Tensor& rows) {
  return (rows.matmul(rows.t()) - at::eye(rows.size(0))).abs().max().item<double>();
}

/// Orthonormalises the rows of a block twice, as the Krylov method does, and checks all that is promised.
void check_decomposed(const Tensor& block) {
  const auto rows = block.clone();
  const auto first = csulora::orthonormalise(rows);
  const auto triangle = first.matmul(csulora::orthonormalise(rows));
  CHECK(at::equal(triangle, triangle.tril()));
  const auto error = (triangle.matmul(rows) - block).norm(2, 1);
  CHECK(error.le(kTolerance * block.norm(2, 1)).all().item<bool>());
  CHECK(orthonormality_error(rows) <= kTolerance);
}

}  // namespace

TEST_CASE("independent rows become orthonormal") {
  at::manual_seed(0);
  const auto block = at::randn({24, 400});
  check_decomposed(block);
  check_decomposed(block * at::logspace(-15, 15, 24).unsqueeze(1));
  check_decomposed(block.narrow(0, 0, 1) + 1e-3 * block);
  check_decomposed(at::randn({9, 9}));
  check_decomposed(at::randn({1, 40}));
}

TEST_CASE("dependent rows are spanned by orthonormal ones") {
  at::manual_seed(1);
  const auto block = at::randn({8, 300});
  check_decomposed(at::randn({20, 8}).matmul(block));
  check_decomposed(at::cat({block, at::zeros({2, 300}), block}));
  check_decomposed(at::zeros({3, 50}));
}
