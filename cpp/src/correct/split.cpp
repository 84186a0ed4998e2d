#include "correct/split.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "linalg/tall_products.h"

namespace csulora {
namespace {

using at::Tensor;

/// Rows per block: a block of the basis in float32 stays in the second-level cache.
constexpr int64_t kRows = 1024;

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

/// target (rows, at least r) = scale * rows (rows, r) in float32.
void read_rows(const Tensor& rows, double scale, MatrixView<float> target) {
  const auto factor = static_cast<float>(scale);
  if (rows.stride(0) == 1) {
    const auto columns = rows.t().to(at::kFloat);  // the rows of the matrix that is seen transposed
    tall::transpose(view(columns), factor, target);
    return;
  }
  const auto block = rows.to(at::kFloat).contiguous();
  const auto entries = view(block);
  for (int64_t i = 0; i < entries.rows; ++i) {
    std::transform(entries.row(i), entries.row(i) + entries.columns, target.row(i),
                   [factor](float entry) { return factor * entry; });
  }
}

/// Reads blocks of rows of a basis (m, k) as float32, each row padded to `directions` entries by zeros.
class BasisBlocks {
 public:
  BasisBlocks(const Tensor& basis, int64_t directions)
      : basis_(basis),
        block_(at::zeros({tall::padded(std::min(basis.size(0), kRows), tall::kRowStep), directions}, at::kFloat)) {}

  /// The block that begins at a row, its rows padded too. Overwrites the one before.
  MatrixView<const float> read(int64_t row) {
    const int64_t count = std::min(kRows, basis_.size(0) - row);
    block_.narrow(0, 0, count).narrow(1, 0, basis_.size(1)).copy_(basis_.narrow(0, row, count));
    const int64_t padded = tall::padded(count, tall::kRowStep);
    if (padded > count) {
      block_.narrow(0, count, padded - count).zero_();
    }
    return view(block_.narrow(0, 0, padded));
  }

 private:
  const Tensor& basis_;
  Tensor block_;
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
  BasisBlocks blocks(basis, directions);

  std::vector<double> sum(directions * width);
  for (int64_t row = 0; row < m; row += kRows) {
    const auto block = blocks.read(row);
    const MatrixView<float> outside{split.row(row) + width, block.rows, width, split.stride};
    read_rows(factor.narrow(0, row, std::min(kRows, m - row)), scale, outside);
    tall::project(block, outside, contiguous_view(sum.data(), directions, width));
  }

  const std::vector<float> rounded(sum.begin(), sum.end());
  SmallMatrix gram(2 * width, 2 * width);
  for (int64_t row = 0; row < m; row += kRows) {
    const auto block = blocks.read(row);
    const MatrixView<float> halves{split.row(row), block.rows, split.columns, split.stride};
    tall::split(block, contiguous_view(rounded.data(), directions, width), halves);
    tall::add_gram(halves, contiguous_view(gram[0], gram.rows(), gram.columns()));
  }
  SmallMatrix coordinates(k, r);
  for (int64_t i = 0; i < k; ++i) {
    std::copy_n(sum.begin() + i * width, r, coordinates[i]);
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
