#include "correct/split.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "correct/gram_root.h"
#include "correct/strips.h"
#include "linalg/tall_products.h"

namespace csulora {
namespace {

using at::Tensor;

/// A float32 matrix whose rows are contiguous.
MatrixView<const float> view(const Tensor& matrix) {
  return {matrix.const_data_ptr<float>(), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

/// The Gram matrix of [inside, outside], each padded to `width` columns, less the padding, from its lower triangle.
SmallMatrix without_padding(const SmallMatrix& lower, int64_t width, int64_t r) {
  SmallMatrix gram(2 * r, 2 * r);
  const auto padded = [&](int64_t column) { return column < r ? column : column - r + width; };
  for (int64_t i = 0; i < 2 * r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      gram[i][j] = gram[j][i] = lower[padded(i)][padded(j)];
    }
  }
  return gram;
}

/// A mixture (2r, j) in float32, both halves of its rows and its columns padded by zeros.
struct PaddedMixture {
  PaddedMixture(const SmallMatrix& mixture, int64_t half)
      : rows(2 * half), width(tall::padded(mixture.columns(), tall::kWidth)), entries(rows * width) {
    const int64_t r = mixture.rows() / 2;
    for (int64_t i = 0; i < mixture.rows(); ++i) {
      const int64_t row = i < r ? i : i - r + half;
      std::copy_n(mixture[i], mixture.columns(), entries.begin() + row * width);
    }
  }

  MatrixView<const float> view() const { return contiguous_view(entries.data(), rows, width); }

  int64_t rows;
  int64_t width;
  std::vector<float> entries;
};

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
  const auto columns = memory.narrow(0, 0, rows * 2 * width).view({rows, 2, width});
  if (width > r || rows > m) {
    columns.zero_();
  }
  const auto split = contiguous_view(columns.mutable_data_ptr<float>(), rows, 2 * width);
  Strips basis_strips(basis.contiguous(), directions), factor_strips(factor, width);

  SmallMatrix sum(directions, width);
  for (int64_t row = 0; row < m; row += kStripRows) {
    const auto strip = basis_strips.read(row);
    const MatrixView<float> outside{split.row(row) + width, std::min(kStripRows, m - row), width, split.stride};
    factor_strips.read(row, static_cast<float>(scale), outside);
    tall::project(strip, {outside.data, strip.rows, width, split.stride}, contiguous_view(sum[0], directions, width));
  }

  const std::vector<float> rounded(sum[0], sum[directions]);
  SmallMatrix gram(2 * width, 2 * width);
  for (int64_t row = 0; row < m; row += kStripRows) {
    const auto strip = basis_strips.read(row);
    const MatrixView<float> halves{split.row(row), strip.rows, split.columns, split.stride};
    tall::split(strip, contiguous_view(rounded.data(), directions, width), halves);
    tall::add_gram(halves, contiguous_view(gram[0], gram.rows(), gram.columns()));
  }
  SmallMatrix coordinates(k, r);
  for (int64_t i = 0; i < k; ++i) {
    std::copy_n(sum[i], r, coordinates[i]);
  }
  return {std::move(coordinates), columns, without_padding(gram, width, r), m};
}

SplitFactor split_in_double(const Tensor& factor, double scale, const Tensor& basis) {
  const auto scaled = factor.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).mul_(scale);
  const auto directions = basis.to(at::kFloat).to(at::kDouble);  // at once, float16 takes five times as long
  const auto coordinates = directions.t().matmul(scaled);
  const auto inside = directions.matmul(coordinates);
  const auto columns = at::cat({inside, scaled - inside}, 1);
  return {SmallMatrix(coordinates), columns.view({scaled.size(0), 2, -1}), SmallMatrix(columns.t().matmul(columns)),
          scaled.size(0)};
}

SmallMatrix root(const SplitFactor& split) {
  if (split.columns.scalar_type() == at::kDouble) {
    return SmallMatrix(std::get<1>(at::linalg_qr(split.columns.flatten(1), "r")));
  }
  return root_of(split.gram);
}

Tensor combined(const SplitFactor& split, const SmallMatrix& mixture) {
  if (split.columns.scalar_type() == at::kDouble) {
    return split.columns.flatten(1).matmul(mixture.tensor());
  }
  const PaddedMixture padded(mixture, split.columns.size(2));
  const auto product = at::empty({split.columns.size(0), padded.width}, at::kFloat);
  tall::multiply(view(split.columns.flatten(1)), padded.view(),
                 contiguous_view(product.mutable_data_ptr<float>(), product.size(0), product.size(1)));
  return product.narrow(0, 0, split.rows).narrow(1, 0, mixture.columns());
}

Tensor combined_rows(const SplitFactor& split, const SmallMatrix& mixture) {
  if (split.columns.scalar_type() == at::kDouble) {
    return mixture.tensor().t().matmul(split.columns.flatten(1).t());
  }
  const PaddedMixture padded(mixture, split.columns.size(2));
  const auto product = at::empty({padded.width, split.rows}, at::kFloat);
  tall::multiply_transposed(view(split.columns.flatten(1)), padded.view(),
                            contiguous_view(product.mutable_data_ptr<float>(), product.size(0), product.size(1)));
  return product.narrow(0, 0, mixture.columns());
}

}  // namespace csulora
