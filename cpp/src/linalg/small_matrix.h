#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace csulora {

/// A row-major float64 matrix of some dozens of rows and columns, for which calling ATen takes longer than its work.
class SmallMatrix {
 public:
  SmallMatrix() = default;

  /// All zeros.
  SmallMatrix(int64_t rows, int64_t columns) : rows_(rows), columns_(columns), entries_(rows * columns) {}

  /// A copy of `matrix` (rows, columns), of any dtype, strides and device.
  explicit SmallMatrix(const at::Tensor& matrix);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  double* operator[](int64_t row) { return entries_.data() + row * columns_; }
  const double* operator[](int64_t row) const { return entries_.data() + row * columns_; }

  /// A copy as a float64 tensor (rows, columns).
  at::Tensor tensor() const;

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::vector<double> entries_;
};

SmallMatrix transposed(const SmallMatrix& matrix);

/// The first `count` rows.
SmallMatrix first_rows(const SmallMatrix& matrix, int64_t count);

/// The first `count` columns, zeros where there are fewer.
SmallMatrix first_columns(const SmallMatrix& matrix, int64_t count);

/// left (l, m) times right (m, n).
SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right);

}  // namespace csulora
