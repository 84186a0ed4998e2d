#include "correct/split.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "linalg/conversion.h"
#include "linalg/tall_products.h"

namespace csulora {
namespace {

using at::Tensor;

/// Rows per strip: of a basis and of the columns, in float32, they stay in the first-level cache.
constexpr int64_t kRows = 64;

/// root^T root = gram, from the Gram of the columns scaled to length 1, so that short columns keep their digits. By
/// eigenvalues where Cholesky's factor would say nothing of columns that depend on others.
SmallMatrix root_of(const SmallMatrix& gram) {
  constexpr double kIndependent = 1e-6;
  const int64_t n = gram.rows();
  std::vector<double> lengths(n);
  for (int64_t i = 0; i < n; ++i) {
    lengths[i] = std::sqrt(std::max(gram[i][i], 0.0));
  }
  auto scaled = at::zeros({n, n}, at::kDouble);
  auto entries = scaled.accessor<double, 2>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      entries[i][j] = lengths[i] > 0 && lengths[j] > 0 ? gram[i][j] / (lengths[i] * lengths[j]) : 0;
    }
  }
  const auto with_lengths = [&](SmallMatrix root) {
    for (int64_t i = 0; i < root.rows(); ++i) {
      for (int64_t j = 0; j < n; ++j) {
        root[i][j] *= lengths[j];
      }
    }
    return root;
  };
  const auto [lower, failed] = at::linalg_cholesky_ex(scaled);
  if (failed.item<int>() == 0 && lower.diagonal().min().item<double>() > kIndependent) {
    return with_lengths(SmallMatrix(lower.t()));
  }
  const auto [values, vectors] = at::linalg_eigh(scaled);
  return with_lengths(SmallMatrix(vectors.t().mul(values.clamp_min(0).sqrt_().unsqueeze(1))));
}

/// A float32 matrix whose rows are contiguous.
MatrixView<const float> view(const Tensor& matrix) {
  return {matrix.const_data_ptr<float>(), matrix.size(0), matrix.size(1), matrix.stride(0)};
}

/// Reads strips of rows of a stored matrix (m, columns) as float32.
class Strips {
 public:
  /// The strip's rows are padded to `width` entries by zeros.
  Strips(const Tensor& matrix, int64_t width)
      : by_columns_(matrix.stride(0) == 1 && matrix.stride(1) != 1 && !matrix.is_contiguous()),
        matrix_(by_columns_ || matrix.stride(1) == 1 ? matrix : matrix.contiguous()),
        width_(width),
        strip_(kRows * width),
        columns_(by_columns_ ? kRows * matrix.size(1) : 0) {}

  /// The strip that begins at a row, with rows of zeros up to a multiple of kRowStep. Overwrites the one before.
  MatrixView<const float> read(int64_t row) {
    const int64_t count = std::min(kRows, matrix_.size(0) - row), padded = tall::padded(count, tall::kRowStep);
    std::fill(strip_.begin() + count * width_, strip_.begin() + padded * width_, 0.0F);
    read(row, 1, contiguous_view(strip_.data(), count, width_));
    return contiguous_view<const float>(strip_.data(), padded, width_);
  }

  /// target (count, at least columns) = scale times the rows that begin at a row; further columns are as they were, or
  /// zeros.
  void read(int64_t row, float scale, MatrixView<float> target) {
    const int64_t columns = matrix_.size(1);
    const auto* const first = address(row);
    if (by_columns_) {  // the rows of the matrix that is seen transposed
      const auto transposed = contiguous_view(columns_.data(), columns, target.rows);
      widen(first, matrix_.scalar_type(), matrix_.stride(1), transposed);
      return tall::transpose(transposed, scale, target);
    }
    widen(first, matrix_.scalar_type(), matrix_.stride(0), {target.data, target.rows, columns, target.stride});
    if (scale != 1) {
      for (int64_t i = 0; i < target.rows; ++i) {
        std::transform(target.row(i), target.row(i) + columns, target.row(i),
                       [scale](float entry) { return scale * entry; });
      }
    }
  }

 private:
  const char* address(int64_t row) const {
    return static_cast<const char*>(matrix_.const_data_ptr()) +
           row * matrix_.stride(0) * static_cast<int64_t>(matrix_.element_size());
  }

  bool by_columns_;
  Tensor matrix_;
  int64_t width_;
  std::vector<float> strip_;
  std::vector<float> columns_;
};

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
  for (int64_t row = 0; row < m; row += kRows) {
    const auto strip = basis_strips.read(row);
    const MatrixView<float> outside{split.row(row) + width, std::min(kRows, m - row), width, split.stride};
    factor_strips.read(row, static_cast<float>(scale), outside);
    tall::project(strip, {outside.data, strip.rows, width, split.stride}, contiguous_view(sum[0], directions, width));
  }

  const std::vector<float> rounded(sum[0], sum[directions]);
  SmallMatrix gram(2 * width, 2 * width);
  for (int64_t row = 0; row < m; row += kRows) {
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
