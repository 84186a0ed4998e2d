#include "linalg/orthonormal.h"

#include <ATen/ATen.h>

#include "linalg/products.h"

namespace csulora {
namespace {

/// How far the pivots of a Cholesky factor may lie apart for it to orthonormalise in float32: the Gram matrix squares
/// the condition, and a sweep later comes a second one.
constexpr double kSafePivots = 1e-2;

}  // namespace

at::Tensor orthonormalise(const at::Tensor& block) {
  const auto [factor, info] = at::linalg_cholesky_ex(block.matmul(block.t()).to(at::kDouble));
  const auto pivots = factor.diagonal();
  const bool safe = info.item<int>() == 0 && pivots.min().item<double>() > kSafePivots * pivots.max().item<double>();
  if (safe) {
    const auto inverse = at::linalg_solve_triangular(factor, at::eye(block.size(0), factor.options()), /*upper=*/false);
    block.copy_(product(inverse.to(at::kFloat), block));
    return factor.to(at::kFloat);
  }
  const auto [directions, triangle] = at::linalg_qr(block.t());
  block.copy_(directions.t());
  return triangle.t();
}

}  // namespace csulora
