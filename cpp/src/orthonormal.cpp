#include "orthonormal.h"

#include <ATen/ATen.h>

namespace csulora {
namespace {

/// Exceeds what rounding does to a float64 Gram matrix of columns of norm 1.
constexpr double kShift = 1e-11;

}  // namespace

std::pair<at::Tensor, at::Tensor> cholesky_qr(const at::Tensor& block) {
  const auto wide = block.to(at::kDouble);
  const auto norms = wide.norm(2, 0);
  auto directions = wide.div(norms.masked_fill(norms == 0, 1));
  for (int round = 0; round < 2; ++round) {
    auto gram = directions.t().matmul(directions);
    gram.diagonal().add_(kShift);
    const auto triangle = std::get<0>(at::linalg_cholesky_ex(gram, /*upper=*/true));
    directions = at::linalg_solve_triangular(triangle, directions, /*upper=*/true, /*left=*/false);
  }
  return {directions.to(at::kFloat), directions.t().matmul(wide).to(at::kFloat)};
}

std::pair<at::Tensor, at::Tensor> orthonormal_columns(const at::Tensor& block) {
  if (!block.is_cpu()) {
    return cholesky_qr(block);
  }
  const auto [orthonormal, triangle] = at::linalg_qr(block);
  return {orthonormal, triangle};
}

}  // namespace csulora
