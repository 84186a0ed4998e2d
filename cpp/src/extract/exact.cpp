#include <ATen/ATen.h>

#include <limits>

#include "extract/decomposition.h"
#include "linalg/row_blocks.h"

namespace csulora {
namespace {

using at::Tensor;

Tensor gram(const Tensor& matrix) {  // (columns, columns) float64
  auto sum = at::zeros({matrix.size(1), matrix.size(1)}, matrix.options().dtype(at::kDouble));
  for_row_blocks(matrix.size(0), matrix.size(1), [&](int64_t row, int64_t count) {
    const auto block = matrix.narrow(0, row, count).to(at::kDouble);
    sum.addmm_(block.t(), block);
  });
  return sum;
}

Tensor product(const Tensor& matrix, const Tensor& factor) {  // (rows, k) float64
  auto result = at::empty({matrix.size(0), factor.size(1)}, factor.options());
  for_row_blocks(matrix.size(0), matrix.size(1), [&](int64_t row, int64_t count) {
    result.narrow(0, row, count).copy_(matrix.narrow(0, row, count).to(at::kDouble).matmul(factor));
  });
  return result;
}

/// Upper bounds on the leading `count` eigenvalues, descending: the solver is off by a few roundings of the largest
/// one. What would follow the last one is 0.
Tensor upper_eigenvalues(const Tensor& ascending, int64_t count) {
  const auto rounding =
      ascending[-1] * (static_cast<double>(ascending.size(0)) * std::numeric_limits<double>::epsilon());
  const int64_t found = std::min(count, ascending.size(0));
  auto bounds = at::zeros({count}, ascending.options());
  bounds.narrow(0, 0, found).copy_(ascending.flip(0).narrow(0, 0, found).clamp_min(0) + rounding);
  return bounds;
}

}  // namespace

SingularTriples exact_triples(const Tensor& matrix, const TargetCount& target_count) {
  const bool wide = matrix.size(0) < matrix.size(1);
  const auto tall = wide ? matrix.t() : matrix;  // (longer, shorter)
  auto eigenvectors = gram(tall).t();            // the same matrix, laid out as the solver writes
  auto eigenvalues = at::empty({eigenvectors.size(0)}, eigenvectors.options());
  at::linalg_eigh_out(eigenvalues, eigenvectors, eigenvectors);  // in its memory: the largest there is
  SingularTriples triples;
  triples.computed = eigenvalues.flip(0).clamp_min_(0).sqrt_();
  const int64_t count = target_count(triples.computed);
  const int64_t rest = tall.size(1) - count;
  const auto leading = eigenvectors.narrow(1, rest, count);
  // Rayleigh-Ritz on the leading eigenvectors restores the digits that squaring cost the vectors and values.
  const auto [left, values, mix] = at::linalg_svd(product(tall, leading), false);
  const auto right = leading.matmul(mix.t());
  triples.u = wide ? right : left;
  triples.s = values;
  triples.v = wide ? left : right;
  const auto upper = upper_eigenvalues(eigenvalues, count + 1);
  triples.upper = upper.sqrt();
  triples.largest_energy = upper.narrow(0, 0, count).sum().item<double>();
  return triples;
}

}  // namespace csulora
