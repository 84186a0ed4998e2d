#include "correct/strips.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "linalg/conversion.h"
#include "linalg/tall_products.h"

namespace csulora {

Strips::Strips(const at::Tensor& matrix, int64_t width)
    : by_columns_(matrix.stride(0) == 1 && matrix.stride(1) != 1 && !matrix.is_contiguous()),
      matrix_(by_columns_ || matrix.stride(1) == 1 ? matrix : matrix.contiguous()),
      width_(width),
      strip_(kStripRows * width),
      columns_(by_columns_ ? kStripRows * matrix.size(1) : 0) {}

MatrixView<const float> Strips::read(int64_t row) {
  const int64_t count = std::min(kStripRows, matrix_.size(0) - row), padded = tall::padded(count, tall::kRowStep);
  std::fill(strip_.begin() + count * width_, strip_.begin() + padded * width_, 0.0F);
  read(row, 1, contiguous_view(strip_.data(), count, width_));
  return contiguous_view<const float>(strip_.data(), padded, width_);
}

void Strips::read(int64_t row, float scale, MatrixView<float> target) {
  const int64_t columns = matrix_.size(1);
  const auto widened = by_columns_  // as rows of the matrix that is seen transposed
                           ? contiguous_view(columns_.data(), columns, target.rows)
                           : MatrixView<float>{target.data, target.rows, columns, target.stride};
  widen(address(row), matrix_.scalar_type(), matrix_.stride(by_columns_ ? 1 : 0), widened);
  if (scale != 1) {
    for (int64_t i = 0; i < widened.rows; ++i) {
      std::transform(widened.row(i), widened.row(i) + widened.columns, widened.row(i),
                     [scale](float entry) { return scale * entry; });
    }
  }
  if (by_columns_) {
    tall::transpose(widened, target);
  }
}

void Strips::prefetch(int64_t row) const {
  constexpr int64_t kCacheLine = 64, kForReading = 0, kIntoSecondLevel = 2;  // the first is full of the strip
  const auto size = static_cast<int64_t>(matrix_.element_size());
  const int64_t count = std::min(kStripRows, matrix_.size(0) - row), columns = matrix_.size(1);
  const int64_t pieces = by_columns_ ? columns : count, bytes = (by_columns_ ? count : columns) * size;
  const int64_t stride = matrix_.stride(by_columns_ ? 1 : 0) * size;
  const auto* const first = address(row);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) {
      __builtin_prefetch(first + piece * stride + byte, kForReading, kIntoSecondLevel);
    }
  }
}

const char* Strips::address(int64_t row) const {
  return static_cast<const char*>(matrix_.const_data_ptr()) +
         row * matrix_.stride(0) * static_cast<int64_t>(matrix_.element_size());
}

}  // namespace csulora
