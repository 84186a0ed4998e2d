#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "linalg/matrix_view.h"

namespace csulora {

/// Rows per strip: of a basis and of the columns, in float32, they stay in the first-level cache.
inline constexpr int64_t kStripRows = 64;

/// Reads strips of rows of a matrix (m, columns) as float32. It is stored as float16, bfloat16 or float32, with any
/// strides.
class Strips {
 public:
  /// The strip's rows are padded to `width` entries by zeros.
  Strips(const at::Tensor& matrix, int64_t width);

  /// The strip that begins at a row, with rows of zeros up to a multiple of tall::kRowStep. Overwrites the one before.
  MatrixView<const float> read(int64_t row);

  /// target (count, at least columns) = scale times the rows that begin at a row; further columns are as they were, or
  /// zeros.
  void read(int64_t row, float scale, MatrixView<float> target);

  /// Has the CPU fetch the rows that begin at a row, while it computes with others.
  void prefetch(int64_t row) const;

 private:
  const char* address(int64_t row) const;

  bool by_columns_;
  at::Tensor matrix_;
  int64_t width_;
  std::vector<float> strip_;
  std::vector<float> columns_;
};

}  // namespace csulora
