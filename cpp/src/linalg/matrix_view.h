#pragma once

#include <cstdint>

namespace csulora {

/// A row-major matrix in memory of somebody else's: (rows, columns) entries, rows `stride` entries apart.
template <typename T>
struct MatrixView {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  T* row(int64_t index) const { return data + index * stride; }

  /// The same matrix, to be read alone.
  operator MatrixView<const T>() const { return {data, rows, columns, stride}; }
};

/// A matrix without gaps between its rows.
template <typename T>
MatrixView<T> contiguous_view(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns};
}

}  // namespace csulora
