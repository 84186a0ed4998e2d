#include "correct/truncation.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "correct/gains.h"
#include "correct/measurement.h"
#include "correct/storage.h"
#include "gpu/placement.h"

namespace csulora {
namespace {

using at::Tensor;

/// root [[p, q], [s, t]], where each entry stands for that many times the identity: columns are mixed two by two.
SmallMatrix mixed(const SmallMatrix& root, double p, double q, double s, double t) {
  const int64_t r = root.columns() / 2;
  SmallMatrix result(root.rows(), 2 * r);
  for (int64_t i = 0; i < root.rows(); ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const double inside = root[i][j], outside = root[i][r + j];
      result[i][j] = inside * p + outside * s;
      result[i][r + j] = inside * q + outside * t;
    }
  }
  return result;
}

/// mixed^T vectors diag(weights), (2r, rank): zeros where there are fewer than `rank` weights. `vectors` are rows.
SmallMatrix combination(const SmallMatrix& mixed, const SmallMatrix& vectors, const std::vector<double>& weights,
                        int64_t rank) {
  SmallMatrix weighted(vectors.columns(), rank);
  for (int64_t i = 0; i < vectors.columns(); ++i) {
    for (size_t j = 0; j < weights.size(); ++j) {
      weighted[i][j] = vectors[j][i] * weights[j];
    }
  }
  return product(transposed(mixed), weighted);
}

/// basis^T columns mixture for a mixture (2r, rank): what lies outside the basis has no coordinates.
SmallMatrix coordinates_of(const SplitFactor& split, const SmallMatrix& mixture) {
  return product(split.coordinates, first_rows(mixture, split.coordinates.columns()));
}

/// The best approximation of a rank of what factors in float64 hold, by torch's decompositions: a GPU's kernels read
/// factors of at most float32, in which columns that all but cancel are nothing but rounding.
Truncated truncated_on_device(const LoraFactors& factors, const Subspace& subspace, int64_t rank) {
  const auto [b_columns, b_root] = at::linalg_qr(factors.b);
  const auto [a_columns, a_root] = at::linalg_qr(factors.a.t());
  const auto [left, values, right] = at::linalg_svd(b_root.mm(a_root.t()), /*full_matrices=*/false);
  const int64_t count = std::min(rank, values.size(0));  // fewer than `rank` where that exceeds a side of the matrix
  const auto lengths = values.narrow(0, 0, count).sqrt();
  const auto columns = [&](const Tensor& orthonormal, const Tensor& mixture) {
    return at::constant_pad_nd(orthonormal.mm(mixture.narrow(1, 0, count).mul(lengths)), {0, rank - count});
  };
  const auto energies = values.square();
  const double total = energies.sum().item<double>(), kept = energies.narrow(0, 0, count).sum().item<double>();
  const auto b = columns(b_columns, left), a = columns(a_columns, right.t());
  const auto coordinates = [](const Tensor& basis, const Tensor& factor) {
    return SmallMatrix(widened(basis, factor.scalar_type()).t().mm(factor));
  };
  return {b, a.t(), coordinates(subspace.u, b), coordinates(subspace.v, a), total == 0 ? 0 : (total - kept) / total};
}

}  // namespace

/// From the singular values W S Z^T of the core R_B M R_A^T, where R are the roots of the columns:
///
///     B' = [B_in, B_out] M R_A^T Z S^-1/2,    A' = S^-1/2 W^T R_B M [A_in, A_out]^T.
///
/// No root is inverted, so dependent columns do no harm. The factors share each singular value, so that rounding them
/// costs what rounding X would.
Truncated truncated_update(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const auto b_root = root(b), a_root = root(a);
  const auto from_b = mixed(b_root, gains.aligned, gains.left, gains.right, gains.off);  // R_B M
  const auto from_a = mixed(a_root, gains.aligned, gains.right, gains.left, gains.off);  // R_A M^T
  const auto [left, values, right] = at::linalg_svd(product(from_b, transposed(a_root)).tensor(), false);

  const double* const singular = values.const_data_ptr<double>();
  const int64_t size = values.size(0);
  const int64_t count = std::min(rank, size);  // fewer than `rank` where that exceeds a side of the matrix
  const auto energy = [&](int64_t first, int64_t last) {
    return std::inner_product(singular + first, singular + last, singular + first, 0.0);
  };
  const double total = energy(0, size);
  const bool in_double = b.columns.scalar_type() == at::kDouble;
  const double floor = (in_double ? kDoubleRounding : kFloatRounding) * std::sqrt(total);
  std::vector<double> weights(count);
  std::transform(singular, singular + count, weights.begin(),
                 [&](double value) { return value > floor ? 1 / std::sqrt(value) : 0; });
  const auto b_mixture = combination(from_a, SmallMatrix(right), weights, rank);
  const auto a_mixture = combination(from_b, SmallMatrix(left.t()), weights, rank);
  return {combined(b, b_mixture), combined_rows(a, a_mixture), coordinates_of(b, b_mixture),
          coordinates_of(a, a_mixture), total == 0 ? 0 : energy(count, size) / total};
}

Truncated truncated(const LoraFactors& factors, const Subspace& subspace, int64_t rank, const std::string& label) {
  if (is_on_device(factors.b)) {
    return truncated_on_device(factors, subspace, rank);
  }
  const auto update = measured(factors, subspace, kEverything, label);
  return truncated_update(update.b, update.a, kEverything, rank);
}

}  // namespace csulora
