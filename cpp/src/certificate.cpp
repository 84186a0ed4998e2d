#include "certificate.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "row_blocks.h"

namespace csulora {
namespace {

using at::Tensor;

double orthonormality_error(const Tensor& gram) {
  return gram.sub(at::eye(gram.size(0), gram.options())).norm().item<double>();
}

/// Products of D with both factors, and the residuals they leave.
struct Residuals {
  Tensor left2;      // (k) |D v - s u|^2
  Tensor right2;     // (k) |D^T u - s v|^2
  Tensor quotients;  // (k) u^T D v
};

Residuals residuals(const Tensor& d, const Tensor& u, const Tensor& s, const Tensor& v) {
  auto left2 = at::zeros_like(s);
  auto quotients = at::zeros_like(s);
  auto transposed = at::zeros_like(v.t(), at::MemoryFormat::Contiguous);  // (k, n) u^T D
  const auto wide = at::empty({std::min(d.size(0), rows_per_block(d.size(1))), d.size(1)}, u.options());
  for_row_blocks(d.size(0), d.size(1), [&](int64_t row, int64_t count) {
    const auto block = wide.narrow(0, 0, count).copy_(d.narrow(0, row, count));
    const auto u_block = u.narrow(0, row, count);
    const auto product = block.matmul(v);  // (count, k)
    quotients.add_(product.mul(u_block).sum(0));
    left2.add_(product.sub(u_block.mul(s)).square().sum(0));
    transposed.addmm_(u_block.t(), block);
  });
  return {left2, transposed.sub(v.mul(s).t()).square().sum(1), quotients};
}

/// |D - U S V^T|^2 = |D|^2 - 2 sum s u^T D v + |U S V^T|^2.
double captured_share(double norm2, const Tensor& s, const Tensor& quotients, const Tensor& gram_u,
                      const Tensor& gram_v) {
  const auto reproduced2 = gram_u.mul(s).mul(gram_v.mul(s).t()).sum();
  return (2 * s.mul(quotients).sum() - reproduced2).item<double>() / norm2;
}

/// What u and v together have outside the true leading subspaces is at most the sum over their columns of
/// (|D v - s u|^2 + |D^T u - s v|^2) / (s - s_{k+1})^2 (Wedin 1972). Orthonormalising the columns stretches it by at
/// most 1 / (1 - error), with the orthonormality error in Frobenius norm.
double missed_bound(const Tensor& residuals2, const Tensor& s, double next_value, double orthonormality) {
  const auto gaps = s - next_value;
  if (orthonormality >= 1 || gaps.le(0).any().item<bool>()) {
    return 1;
  }
  const double sine2 = residuals2.div(gaps.square()).sum().item<double>();
  return std::min(1.0, sine2 / static_cast<double>(s.size(0)) / (1 - orthonormality));
}

}  // namespace

Certificate measure_factors(const Displacement& d, const Subspace& subspace, double next_value) {
  Certificate certificate;
  certificate.displacement_norm2 = d.norm2;
  certificate.next_value = next_value;
  certificate.noise_edge = d.noise_edge;
  if (subspace.s.size(0) == 0) {
    return certificate;
  }
  const auto u = subspace.u.to(at::kDouble);
  const auto s = subspace.s.to(at::kDouble);
  const auto v = subspace.v.to(at::kDouble);
  const auto measured = residuals(d.matrix, u, s, v);
  const auto gram_u = u.t().matmul(u);
  const auto gram_v = v.t().matmul(v);
  certificate.residual = at::maximum(measured.left2, measured.right2).sqrt().div(s).max().item<double>();
  certificate.orthonormality = std::max(orthonormality_error(gram_u), orthonormality_error(gram_v));
  certificate.captured = captured_share(d.norm2, s, measured.quotients, gram_u, gram_v);
  certificate.missed = missed_bound(measured.left2 + measured.right2, s, next_value, certificate.orthonormality);
  return certificate;
}

}  // namespace csulora
