#include "certificate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_blocks.h"

namespace csulora {
namespace {

using at::Tensor;

Tensor gram(const Tensor& basis) {
  const auto wide = basis.to(at::kDouble);
  return wide.t().matmul(wide);
}

double orthonormality_error(const Tensor& gram) {
  return gram.sub(at::eye(gram.size(0), gram.options())).norm().item<double>();
}

/// How products with D are formed.
struct Precision {
  at::ScalarType type;
  int64_t rows, terms;  ///< rows of D in a block, and terms of a sum in `type`
  double rounded;       ///< what a product with a unit vector may be off by
};

/// Sums in float64 take over after `kTerms` terms. Of |D|_F, random entries then lose a tenth of a unit of rounding and
/// constant ones, whose rounding adds up, four; eight are allowed for.
Precision in_float32(const Displacement& d) {
  constexpr int64_t kTerms = 256;
  constexpr double kRounded = 4 * std::numeric_limits<float>::epsilon();
  return {at::kFloat, kTerms, kTerms, kRounded * std::sqrt(d.norm2)};
}

Precision in_float64(const Displacement& d) {
  const int64_t columns = d.matrix.size(1);
  return {at::kDouble, rows_per_block(columns), columns, 0};
}

/// Products of D with both factors, and the residuals they leave; float64.
struct Residuals {
  Tensor left;       // (k) |D v - s u|
  Tensor right;      // (k) |D^T u - s v|
  Tensor quotients;  // (k) u^T D v
  double rounded;    // what each of them may be off by
};

Residuals residuals(const Tensor& d, const Subspace& subspace, const Precision& precision) {
  const auto u = subspace.u.to(precision.type), v = subspace.v.to(precision.type);
  const auto s = subspace.s.to(at::kDouble);
  const int64_t m = d.size(0), n = d.size(1);
  auto left2 = at::zeros_like(s);
  auto quotients = at::zeros_like(s);
  auto transposed = at::zeros({s.size(0), n}, s.options());  // u^T D
  for (int64_t row = 0; row < m; row += precision.rows) {
    const int64_t count = std::min(precision.rows, m - row);
    const auto block = d.narrow(0, row, count).to(precision.type), u_block = u.narrow(0, row, count);
    auto product = at::zeros({count, s.size(0)}, s.options());
    for (int64_t term = 0; term < n; term += precision.terms) {
      const int64_t terms = std::min(precision.terms, n - term);
      product.add_(block.narrow(1, term, terms).mm(v.narrow(0, term, terms)));
    }
    quotients.add_(product.mul(u_block).sum(0));
    left2.add_(product.sub(u_block.mul(s)).square().sum(0));
    transposed.add_(u_block.t().mm(block));
  }
  return {left2.sqrt(), transposed.sub(v.t().mul(s.unsqueeze(1))).norm(2, 1), quotients, precision.rounded};
}

/// In float64, unless factors on a CPU were rounded so much more coarsely that float32, which takes a third of the
/// time, does as well.
Residuals residuals(const Displacement& d, const Subspace& subspace) {
  if (d.matrix.is_cpu() && fits_float32(d) && subspace.u.element_size() < static_cast<int64_t>(sizeof(float))) {
    auto measured = residuals(d.matrix, subspace, in_float32(d));
    if (at::maximum(measured.left, measured.right).gt(2 * measured.rounded).all().item<bool>()) {
      return measured;
    }
  }
  return residuals(d.matrix, subspace, in_float64(d));
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
  const auto measured = residuals(d, subspace);
  const auto left = measured.left + measured.rounded, right = measured.right + measured.rounded;
  const auto s = subspace.s.to(at::kDouble);
  const auto gram_u = gram(subspace.u), gram_v = gram(subspace.v);
  certificate.residual = at::maximum(left, right).div(s).max().item<double>();
  certificate.orthonormality = std::max(orthonormality_error(gram_u), orthonormality_error(gram_v));
  certificate.captured = captured_share(d.norm2, s, measured.quotients, gram_u, gram_v);
  certificate.missed = missed_bound(left.square() + right.square(), s, next_value, certificate.orthonormality);
  return certificate;
}

}  // namespace csulora
