#include "linalg/small_matrix.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "linalg/widest_vectors.h"

namespace csulora {
namespace {

/// result += left (rows, inner) right (inner, columns).
struct AddProduct {
  template <int kLanes>
  CSULORA_INLINED static void run(const double* left, const double* right, int64_t rows, int64_t inner, int64_t columns,
                                  double* result) {
    for (int64_t i = 0; i < rows; ++i) {
      double* const target = result + i * columns;
      for (int64_t k = 0; k < inner; ++k) {
        const double factor = left[i * inner + k];
        for (int64_t j = 0; j < columns; ++j) {
          target[j] += factor * right[k * columns + j];
        }
      }
    }
  }
};

}  // namespace

SmallMatrix::SmallMatrix(const at::Tensor& matrix) : SmallMatrix(matrix.size(0), matrix.size(1)) {
  const auto wide = matrix.to(at::kCPU, at::kDouble).contiguous();
  std::copy_n(wide.const_data_ptr<double>(), entries_.size(), entries_.begin());
}

at::Tensor SmallMatrix::tensor() const {
  auto copy = at::empty({rows_, columns_}, at::kDouble);
  std::copy(entries_.begin(), entries_.end(), copy.mutable_data_ptr<double>());
  return copy;
}

SmallMatrix transposed(const SmallMatrix& matrix) {
  SmallMatrix result(matrix.columns(), matrix.rows());
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    for (int64_t j = 0; j < matrix.columns(); ++j) {
      result[j][i] = matrix[i][j];
    }
  }
  return result;
}

SmallMatrix first_rows(const SmallMatrix& matrix, int64_t count) {
  SmallMatrix result(count, matrix.columns());
  std::copy_n(matrix[0], count * matrix.columns(), result[0]);
  return result;
}

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right) {
  SmallMatrix result(left.rows(), right.columns());
  run_widest<AddProduct>(left[0], right[0], left.rows(), left.columns(), right.columns(), result[0]);
  return result;
}

}  // namespace csulora
