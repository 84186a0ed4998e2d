// What takes Householder QR's place on a GPU, run on the CPU: all of it is torch's operations.
#include <ATen/ATen.h>
#include <doctest/doctest.h>

#include "orthonormal.h"

namespace {

using at::Tensor;

constexpr double kTolerance = 1e-5;  // float32

void check_decomposes(const Tensor& block) {
  const auto [directions, triangle] = csulora::cholesky_qr(block);
  const auto norms = block.norm(2, 0);
  const auto error = (directions.matmul(triangle) - block).norm(2, 0);
  CHECK(error.le(kTolerance * norms).all().item<bool>());
}

double orthonormality_error(const Tensor& directions) {
  const auto gram = directions.t().matmul(directions);
  return (gram - at::eye(gram.size(0))).abs().max().item<double>();
}

}  // namespace

TEST_CASE("independent columns become orthonormal") {
  at::manual_seed(0);
  const auto block = at::randn({400, 24});
  for (const auto& columns : {block, block * at::logspace(-15, 15, 24), block.narrow(1, 0, 1) + 1e-3 * block}) {
    check_decomposes(columns);
    CHECK(orthonormality_error(csulora::cholesky_qr(columns).first) <= kTolerance);
  }
}

TEST_CASE("dependent columns are spanned and never longer than 1") {
  at::manual_seed(1);
  const auto block = at::randn({300, 8});
  const auto rank_deficient = block.matmul(at::randn({8, 20}));
  auto with_zeros = at::cat({block, at::zeros({300, 2}), block}, 1);
  for (const auto& columns : {rank_deficient, with_zeros, at::zeros({50, 3}), at::randn({5, 9})}) {
    check_decomposes(columns);
    const auto directions = csulora::cholesky_qr(columns).first;
    CHECK(directions.isfinite().all().item<bool>());
    CHECK(at::linalg_matrix_norm(directions, 2).item<double>() <= 1 + kTolerance);
  }
}
