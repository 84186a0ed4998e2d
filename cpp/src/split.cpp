#include "split.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "tall_products.h"

namespace csulora {
namespace {

using at::Tensor;

/// Rows per block: a block of the basis in float32 stays in the second-level cache.
constexpr int64_t kRows = 1024;

/// root^T root = gram, from the Gram of the columns scaled to length 1, so that short columns keep their digits. By
/// eigenvalues where Cholesky's factor would say nothing of columns that depend on others. NaN if `gram` is not finite.
Tensor root_of(const Tensor& gram) {
  constexpr double kIndependent = 1e-6;
  if (!std::isfinite(gram.sum().item<double>())) {
    return at::full_like(gram, NAN);
  }
  const auto lengths = gram.diagonal().clamp_min(0).sqrt();
  const auto inverse = at::where(lengths > 0, lengths.reciprocal(), lengths);
  const auto scaled = gram.mul(inverse).mul_(inverse.unsqueeze(1));
  const auto [lower, failed] = at::linalg_cholesky_ex(scaled);
  if (failed.item<int>() == 0 && lower.diagonal().min().item<double>() > kIndependent) {
    return lower.t().mul(lengths);
  }
  const auto [values, vectors] = at::linalg_eigh(scaled);
  return vectors.t().mul(values.clamp_min(0).sqrt_().unsqueeze(1)).mul_(lengths);
}

}  // namespace

SplitFactor split_in_float(const Tensor& factor, double scale, const Tensor& basis, Tensor& memory) {
  const int64_t m = factor.size(0);
  const int64_t r = factor.size(1);
  const int64_t k = basis.size(1);
  const int64_t width = tall::padded(r, tall::kWidth);
  const int64_t directions = tall::padded(k, tall::kRowStep);
  const int64_t rows = tall::padded(m, tall::kRowStep);
  if (memory.numel() < rows * 2 * width) {
    memory.resize_({rows * 2 * width});
  }
  auto columns = memory.narrow(0, 0, rows * 2 * width).view({rows, 2, width});
  if (width > r || rows > m) {
    columns.zero_();
  }
  auto scaled = columns.select(1, 1).narrow(1, 0, r);  // where the outside will be
  const auto block = at::zeros({std::min(rows, kRows), directions}, at::kFloat);
  const auto read = [&](int64_t row) {  // a block of the basis; the last one ends in zeros
    const int64_t count = std::min(kRows, m - row);
    block.narrow(0, 0, count).narrow(1, 0, k).copy_(basis.narrow(0, row, count));
    const int64_t padded = tall::padded(count, tall::kRowStep);
    if (padded > count) {
      block.narrow(0, count, padded - count).zero_();
    }
    return padded;
  };

  const auto part = at::empty({directions, width}, at::kFloat);
  const auto sum = at::zeros({directions, width}, at::kDouble);
  for (int64_t row = 0; row < m; row += kRows) {
    const int64_t count = read(row);
    const int64_t given = std::min(kRows, m - row);
    auto target = scaled.narrow(0, row, given);
    target.copy_(factor.narrow(0, row, given).to(at::kFloat).contiguous());  // in one step, a transpose takes longer
    if (scale != 1) {
      target.mul_(scale);
    }
    tall::project(block.data_ptr<float>(), count, directions, columns.data_ptr<float>() + (2 * row + 1) * width, width,
                  2 * width, part.data_ptr<float>());
    sum.add_(part);
  }

  const auto rounded = sum.to(at::kFloat);
  const auto gram = at::zeros({2 * width, 2 * width}, at::kDouble);
  for (int64_t row = 0; row < m; row += kRows) {
    const int64_t count = read(row);
    float* const split = columns.data_ptr<float>() + 2 * row * width;
    tall::split(block.data_ptr<float>(), count, directions, rounded.data_ptr<float>(), width, split);
    tall::add_gram(split, count, 2 * width, gram.data_ptr<double>());
  }
  const auto without_padding = [&](const Tensor& padded) {
    return padded.view({-1, 2, width}).narrow(2, 0, r).reshape({-1, 2 * r});
  };
  const auto whole = gram.tril().add_(gram.tril(-1).t());
  const auto inner = without_padding(without_padding(whole).t().contiguous());
  return {sum.narrow(0, 0, k).narrow(1, 0, r), without_padding(columns.narrow(0, 0, m)), inner, root_of(inner)};
}

SplitFactor split_in_double(const Tensor& factor, double scale, const Tensor& basis) {
  const auto scaled = factor.to(at::kDouble).mul_(scale);
  const auto directions = basis.to(at::kFloat).to(at::kDouble);  // at once, float16 takes five times as long
  const auto coordinates = directions.t().matmul(scaled);
  const auto inside = directions.matmul(coordinates);
  const auto columns = at::cat({inside, scaled - inside}, 1);
  const auto root = std::get<1>(at::linalg_qr(columns, "r"));
  return {coordinates, columns, root.t().matmul(root), root};
}

}  // namespace csulora
