#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

/// Plain dense arithmetic in double precision, the reference that the tests compare with.
namespace dense {

class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns) : rows_(rows), columns_(columns), entries_(rows * columns) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  double& operator()(int64_t i, int64_t j) { return entries_[i * columns_ + j]; }
  double operator()(int64_t i, int64_t j) const { return entries_[i * columns_ + j]; }

 private:
  int64_t rows_;
  int64_t columns_;
  std::vector<double> entries_;
};

inline Matrix operator*(const Matrix& left, const Matrix& right) {
  Matrix product(left.rows(), right.columns());
  for (int64_t i = 0; i < left.rows(); ++i) {
    for (int64_t k = 0; k < left.columns(); ++k) {
      for (int64_t j = 0; j < right.columns(); ++j) {
        product(i, j) += left(i, k) * right(k, j);
      }
    }
  }
  return product;
}

inline Matrix operator*(double factor, Matrix matrix) {
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    for (int64_t j = 0; j < matrix.columns(); ++j) {
      matrix(i, j) *= factor;
    }
  }
  return matrix;
}

inline Matrix operator+(Matrix left, const Matrix& right) {
  for (int64_t i = 0; i < left.rows(); ++i) {
    for (int64_t j = 0; j < left.columns(); ++j) {
      left(i, j) += right(i, j);
    }
  }
  return left;
}

inline Matrix operator-(const Matrix& left, const Matrix& right) { return left + -1.0 * right; }

inline Matrix transposed(const Matrix& matrix) {
  Matrix result(matrix.columns(), matrix.rows());
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    for (int64_t j = 0; j < matrix.columns(); ++j) {
      result(j, i) = matrix(i, j);
    }
  }
  return result;
}

/// Sum of products of entries.
inline double inner(const Matrix& left, const Matrix& right) {
  double sum = 0;
  for (int64_t i = 0; i < left.rows(); ++i) {
    for (int64_t j = 0; j < left.columns(); ++j) {
      sum += left(i, j) * right(i, j);
    }
  }
  return sum;
}

inline double norm(const Matrix& matrix) { return std::sqrt(inner(matrix, matrix)); }

inline Matrix diagonal(const std::vector<double>& values) {
  const auto size = static_cast<int64_t>(values.size());
  Matrix result(size, size);
  for (int64_t i = 0; i < size; ++i) {
    result(i, i) = values[i];
  }
  return result;
}

inline Matrix gaussian(int64_t rows, int64_t columns, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  Matrix result(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      result(i, j) = normal(generator);
    }
  }
  return result;
}

/// Random orthonormal columns, by Gram-Schmidt done twice.
inline Matrix orthonormal(int64_t rows, int64_t columns, uint64_t seed) {
  auto basis = transposed(gaussian(rows, columns, seed));  // rows are contiguous
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t previous = 0; previous < 2 * i; ++previous) {
      double overlap = 0;
      for (int64_t j = 0; j < rows; ++j) {
        overlap += basis(i, j) * basis(previous % i, j);
      }
      for (int64_t j = 0; j < rows; ++j) {
        basis(i, j) -= overlap * basis(previous % i, j);
      }
    }
    double norm2 = 0;
    for (int64_t j = 0; j < rows; ++j) {
      norm2 += basis(i, j) * basis(i, j);
    }
    for (int64_t j = 0; j < rows; ++j) {
      basis(i, j) /= std::sqrt(norm2);
    }
  }
  return transposed(basis);
}

inline at::Tensor tensor(const Matrix& matrix, at::ScalarType dtype = at::kFloat) {
  auto result = at::empty({matrix.rows(), matrix.columns()}, at::kDouble);
  auto entries = result.accessor<double, 2>();
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    for (int64_t j = 0; j < matrix.columns(); ++j) {
      entries[i][j] = matrix(i, j);
    }
  }
  return result.to(dtype);
}

inline Matrix matrix(const at::Tensor& tensor) {
  const auto wide = tensor.to(at::kDouble);
  const auto entries = wide.accessor<double, 2>();
  Matrix result(wide.size(0), wide.size(1));
  for (int64_t i = 0; i < result.rows(); ++i) {
    for (int64_t j = 0; j < result.columns(); ++j) {
      result(i, j) = entries[i][j];
    }
  }
  return result;
}

/// The entries of a vector.
inline std::vector<double> values(const at::Tensor& vector) {
  const auto wide = vector.to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

}  // namespace dense
