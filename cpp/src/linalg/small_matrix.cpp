#include "linalg/small_matrix.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "linalg/widest_vectors.h"

namespace csulora {
namespace {

template <int kBytes>
using Doubles __attribute__((vector_size(kBytes))) = double;

/// result += left (rows, inner) right (inner, columns), of which tiles stay in registers.
struct AddProduct {
  /// `Entry` is a vector of columns, or one.
  template <int64_t kRows, int64_t kEntries, typename Entry>
  CSULORA_INLINED static void add_tile(const double* left, const double* right, int64_t inner, int64_t columns,
                                       double* result) {
    constexpr int64_t kStep = sizeof(Entry) / sizeof(double);
    Entry sums[kRows][kEntries] = {};
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < kEntries; ++j) {
        Entry others;
        std::memcpy(&others, right + k * columns + j * kStep, sizeof others);
        for (int64_t i = 0; i < kRows; ++i) {
          sums[i][j] += left[i * inner + k] * others;
        }
      }
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kEntries; ++j) {
        Entry entries;
        double* const target = result + i * columns + j * kStep;
        std::memcpy(&entries, target, sizeof entries);
        entries += sums[i][j];
        std::memcpy(target, &entries, sizeof entries);
      }
    }
  }

  template <int64_t kRows, int kLanes>
  CSULORA_INLINED static void add_rows(const double* left, const double* right, int64_t inner, int64_t columns,
                                       double* result) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      add_tile<kRows, 2, Doubles<kLanes * sizeof(float)>>(left, right + j, inner, columns, result + j);
    }
    for (; j < columns; ++j) {
      add_tile<kRows, 1, double>(left, right + j, inner, columns, result + j);
    }
  }

  template <int kLanes>
  CSULORA_INLINED static void run(const double* left, const double* right, int64_t rows, int64_t inner, int64_t columns,
                                  double* result) {
    constexpr int64_t kRows = 4;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      add_rows<kRows, kLanes>(left + i * inner, right, inner, columns, result + i * columns);
    }
    for (; i < rows; ++i) {
      add_rows<1, kLanes>(left + i * inner, right, inner, columns, result + i * columns);
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

SmallMatrix first_columns(const SmallMatrix& matrix, int64_t count) {
  SmallMatrix result(matrix.rows(), count);
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    std::copy_n(matrix[i], std::min(count, matrix.columns()), result[i]);
  }
  return result;
}

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right) {
  SmallMatrix result(left.rows(), right.columns());
  run_widest<AddProduct>(left[0], right[0], left.rows(), left.columns(), right.columns(), result[0]);
  return result;
}

}  // namespace csulora
