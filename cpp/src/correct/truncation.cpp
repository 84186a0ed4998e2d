#include "correct/truncation.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "correct/gains.h"
#include "correct/measurement.h"
#include "correct/storage.h"
#include "gpu/placement.h"
#include "linalg/symmetric_eigen.h"

namespace csulora {
namespace {

using at::Tensor;

/// root M with M = [[aligned, left], [right, off]], each of which stands for that many times the identity: columns are
/// mixed two by two.
SmallMatrix mixed_columns(const SmallMatrix& root, const Gains& gains) {
  const int64_t r = root.columns() / 2;
  SmallMatrix result(root.rows(), 2 * r);
  for (int64_t i = 0; i < root.rows(); ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const double inside = root[i][j], outside = root[i][r + j];
      result[i][j] = inside * gains.aligned + outside * gains.right;
      result[i][r + j] = inside * gains.left + outside * gains.off;
    }
  }
  return result;
}

/// M matrix, for the same M.
SmallMatrix mixed_rows(const SmallMatrix& matrix, const Gains& gains) {
  return transposed(mixed_columns(transposed(matrix), {gains.aligned, gains.right, gains.left, gains.off}));
}

/// Multiplies columns by their weights.
SmallMatrix weighted(SmallMatrix matrix, const std::vector<double>& weights) {
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    std::transform(weights.begin(), weights.end(), matrix[i], matrix[i], std::multiplies<double>());
  }
  return matrix;
}

std::vector<double> numbers(const Tensor& values) {
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

/// 1 / sqrt(s) for the first singular values s, as many as the rank; 0 where there is none, or nothing but rounding.
std::vector<double> inverse_roots(const std::vector<double>& singular, int64_t rank, double rounding) {
  const double norm2 = std::inner_product(singular.begin(), singular.end(), singular.begin(), 0.0);
  std::vector<double> result(rank);
  std::transform(
      singular.begin(), singular.begin() + std::min<int64_t>(rank, singular.size()), result.begin(),
      [floor = rounding * std::sqrt(norm2)](double value) { return value > floor ? 1 / std::sqrt(value) : 0; });
  return result;
}

/// For columns in float64: M R_A^T Z S^-1/2 and (R_B M)^T W S^-1/2.
Mixtures by_singular_values(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const auto a_root = root(a), mixed_b = mixed_columns(root(b), gains);
  const auto [left, values, right] = at::linalg_svd(product(mixed_b, transposed(a_root)).tensor(), false);
  auto singular = numbers(values);
  const auto lengths = inverse_roots(singular, rank, kDoubleRounding);
  const auto mixture = [&](const SmallMatrix& mixed_root, const Tensor& vectors) {
    return weighted(product(mixed_root, first_columns(SmallMatrix(vectors), rank)), lengths);
  };
  return {mixture(mixed_rows(transposed(a_root), gains), right.t()), mixture(transposed(mixed_b), left),
          std::move(singular)};
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

Mixtures by_eigenvalues(const SmallMatrix& b_root, const SmallMatrix& a_gram, const Gains& gains, int64_t rank) {
  const auto mixed_b = mixed_columns(b_root, gains);
  auto [singular, vectors] = symmetric_eigen(product(product(mixed_b, a_gram), transposed(mixed_b)));
  std::transform(singular.begin(), singular.end(), singular.begin(),
                 [](double square) { return std::sqrt(std::max(square, 0.0)); });
  auto lengths = inverse_roots(singular, rank, kFloatRounding);
  auto a_mixture = weighted(product(transposed(mixed_b), first_columns(transposed(vectors), rank)), lengths);
  std::transform(lengths.begin(), lengths.end(), lengths.begin(), [](double length) { return length * length; });
  auto b_mixture = weighted(mixed_rows(product(a_gram, a_mixture), gains), lengths);
  return {std::move(b_mixture), std::move(a_mixture), std::move(singular)};
}

double truncation_error(const std::vector<double>& singular, int64_t rank) {
  const auto rest = singular.begin() + std::min<int64_t>(rank, singular.size());
  const double given_up = std::inner_product(rest, singular.end(), rest, 0.0);
  const double total = given_up + std::inner_product(singular.begin(), rest, singular.begin(), 0.0);
  return total == 0 ? 0 : given_up / total;
}

Truncated truncated_update(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank) {
  const bool in_double = b.columns.scalar_type() == at::kDouble;
  const auto mixtures =
      in_double ? by_singular_values(b, a, gains, rank) : by_eigenvalues(root(b), a.gram, gains, rank);
  return {combined(b, mixtures.b), combined_rows(a, mixtures.a), coordinates_of(b, mixtures.b),
          coordinates_of(a, mixtures.a), truncation_error(mixtures.singular, rank)};
}

Truncated truncated(const LoraFactors& factors, const Subspace& subspace, int64_t rank, const std::string& label) {
  if (is_on_device(factors.b)) {
    return truncated_on_device(factors, subspace, rank);
  }
  const auto update = measured(factors, subspace, kEverything, label);
  return truncated_update(update.b, update.a, kEverything, rank);
}

}  // namespace csulora
