#include "extract/certificate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "linalg/products.h"
#include "linalg/row_blocks.h"

namespace csulora {
namespace {

using at::Tensor;

/// The stored triples in float64, vectors as rows.
struct Triples {
  Tensor u;  // (k, m)
  Tensor s;  // (k)
  Tensor v;  // (k, n)
};

Triples widened(const Subspace& subspace) {
  const auto rows = [](const Tensor& factor) { return factor.t().contiguous().to(at::kDouble); };
  return {rows(subspace.u), subspace.s.to(at::kDouble), rows(subspace.v)};
}

Tensor gram(const Tensor& rows) { return rows.mm(rows.t()); }

double orthonormality_error(const Tensor& gram) {
  return gram.sub(at::eye(gram.size(0), gram.options())).norm().item<double>();
}

/// Products of D with both factors; float64.
struct Products {
  Tensor left;   // (k, m) D v
  Tensor right;  // (k, n) D^T u
  Tensor error;  // (k) what each of them may be off by
};

/// Equal terms, whose rounding adds up, lose up to kFloatTerms / 2 units of rounding of their sum, and these sums are
/// as long as s. Random ones lose a tenth of a unit of |D|_F; eight are allowed for.
Products products_in_float(const Displacement& d, const Triples& triples) {
  constexpr double kUnit = std::numeric_limits<float>::epsilon() / 2;
  const auto& [u, s, v] = triples;
  const auto error = s * (kFloatTerms / 2 * kUnit) + 8 * kUnit * std::sqrt(d.norm2);
  Products result{at::empty_like(u), at::empty_like(v), error};
  multiply(result.left, v.to(at::kFloat), d.matrix.t());
  multiply(result.right, u.to(at::kFloat), d.matrix);
  return result;
}

Products products_in_double(const Displacement& d, const Triples& triples) {
  const auto &u = triples.u, &v = triples.v;
  Products result{at::empty_like(u), at::zeros_like(v), at::zeros_like(triples.s)};
  for_row_blocks(u.size(1), v.size(1), [&](int64_t row, int64_t count) {
    const auto block = d.matrix.narrow(0, row, count).to(at::kDouble);
    result.left.narrow(1, row, count).copy_(product(v, block.t()));
    add_product(result.right, u.narrow(1, row, count), block, 1);
  });
  return result;
}

/// What D does to both factors; float64.
struct Residuals {
  Tensor left;       // (k) |D v - s u|
  Tensor right;      // (k) |D^T u - s v|
  Tensor quotients;  // (k) u^T D v
  Tensor error;      // (k) what each of them may be off by
};

/// In the memory of the products: a system hands out fresh memory slower than this fills it.
Residuals residuals(Products&& products, const Triples& triples) {
  const auto& [u, s, v] = triples;
  const auto lengths = s.unsqueeze(1);
  const auto quotients = at::linalg_vecdot(products.left, u);
  return {products.left.addcmul_(u, lengths, -1).norm(2, 1), products.right.addcmul_(v, lengths, -1).norm(2, 1),
          quotients, products.error};
}

/// In float64, unless factors on a CPU were rounded to half precision, so much more coarsely that float32, which takes
/// a third of the time, does as well. The largest residual says how coarsely: that of a vector which half precision
/// happens to hold, such as a constant one, is nothing but the error, and bounds nothing that others do not.
Residuals residuals(const Displacement& d, const Triples& triples, bool in_half) {
  if (d.matrix.is_cpu() && fits_float32(d) && in_half) {
    auto measured = residuals(products_in_float(d, triples), triples);
    const auto largest = at::maximum(measured.left, measured.right).div(triples.s).max();
    if (largest.gt(2 * measured.error.div(triples.s).max()).item<bool>()) {
      return measured;
    }
  }
  return residuals(products_in_double(d, triples), triples);
}

/// |D - U S V^T|^2 = |D|^2 - 2 sum s u^T D v + |U S V^T|^2. What the products may be off by does not count as captured.
double captured_energy(double norm2, const Tensor& s, const Residuals& measured, const Tensor& gram_u,
                       const Tensor& gram_v) {
  const auto reproduced2 = gram_u.mul(s).mul(gram_v.mul(s).t()).sum();
  return (2 * s.mul(measured.quotients - measured.error).sum() - reproduced2).item<double>() / norm2;
}

/// What u and v together have outside the true leading subspaces is at most the sum over their columns of
/// (|D v - s u|^2 + |D^T u - s v|^2) / (s - s_{k+1})^2 (Wedin 1972). Orthonormalising the columns stretches it by at
/// most 1 / (1 - error), with the orthonormality error in Frobenius norm.
double subspace_error_bound(const Tensor& residuals2, const Tensor& s, double next_value, double orthonormality) {
  const auto gaps = s - next_value;
  if (s.size(0) == 0 || orthonormality >= 1 || gaps.le(0).any().item<bool>()) {
    return 1;
  }
  const double sine2 = residuals2.div(gaps.square()).sum().item<double>();
  return std::min(1.0, sine2 / static_cast<double>(s.size(0)) / (1 - orthonormality));
}

/// Directions stand out if the bound on what they miss of the true ones is no larger.
constexpr double kLargestSubspaceError = 0.01;

/// The error bound of the leading `count` directions, for every count from 0 on.
std::vector<double> subspace_error_bounds(const Tensor& residuals2, const Tensor& s, const Tensor& upper,
                                          double orthonormality) {
  std::vector<double> bounds;
  for (int64_t count = 0; count <= s.size(0); ++count) {
    bounds.push_back(subspace_error_bound(residuals2.narrow(0, 0, count), s.narrow(0, 0, count),
                                          upper[count].item<double>(), orthonormality));
  }
  return bounds;
}

/// The most leading directions whose error bound is small.
int64_t count_standing_out(const std::vector<double>& bounds) {
  auto count = static_cast<int64_t>(bounds.size()) - 1;
  while (count > 0 && bounds[count] > kLargestSubspaceError) {
    --count;
  }
  return count;
}

}  // namespace

Certificate measure_factors(const Displacement& d, const Subspace& subspace, const Optimum& optimum,
                            std::optional<int64_t> standing_out) {
  Certificate certificate;
  certificate.displacement_norm2 = d.norm2;
  certificate.next_value = optimum.upper[-1].item<double>();
  certificate.noise_edge = d.noise_edge;
  if (subspace.s.size(0) == 0) {
    return certificate;
  }
  const auto triples = widened(subspace);
  const bool in_half = subspace.u.element_size() < static_cast<int64_t>(sizeof(float));
  const auto measured = residuals(d, triples, in_half);
  const auto left = measured.left + measured.error, right = measured.right + measured.error;
  const auto& s = triples.s;
  const auto gram_u = gram(triples.u), gram_v = gram(triples.v);
  certificate.residual = at::maximum(left, right).div(s).max().item<double>();
  certificate.orthonormality = std::max(orthonormality_error(gram_u), orthonormality_error(gram_v));
  certificate.captured_energy = captured_energy(d.norm2, s, measured, gram_u, gram_v);
  certificate.optimal_share = std::clamp(certificate.captured_energy * d.norm2 / optimum.largest_energy, 0.0, 1.0);
  const auto bounds =
      subspace_error_bounds(left.square() + right.square(), s, optimum.upper, certificate.orthonormality);
  certificate.standing_out = standing_out.value_or(count_standing_out(bounds));
  certificate.subspace_error = bounds[certificate.standing_out];
  return certificate;
}

}  // namespace csulora
