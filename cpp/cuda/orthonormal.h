#pragma once

#include <cstdint>

#include "handles.h"

namespace csulora::cuda {

/// Matrices of a batch, column-major float64, `stride` entries apart.
struct Batch {
  double* data;
  int64_t leading;  ///< leading dimension
  int64_t stride;
};

/// An operand of `multiply`, transposed or as it is.
struct Operand {
  Batch matrix;
  bool transposed = false;
};

/// result (rows, columns) = left (rows, inner) right (inner, columns), for each of `count`.
struct Product {
  int64_t rows;
  int64_t columns;
  int64_t inner;
};
void multiply(const HandleLease& lease, int64_t count, const Product& product, const Operand& left,
              const Operand& right, const Batch& result);

/// What `orthonormalise` works with: matrices (rows, size), and scratch.
struct Orthonormalisation {
  int64_t rows;
  int64_t size;
  double* input;               ///< (count, rows, size) columns of norm 1 or 0; overwritten
  double* result;              ///< (count, rows, size)
  double* gram;                ///< (count, size, size) scratch
  double* inverse;             ///< likewise
  double** gram_addresses;     ///< (count) of the matrices in gram
  double** inverse_addresses;  ///< (count)
  int* statuses;               ///< (kRounds, count) written: 0 for success
};

inline constexpr int kRounds = 3;

/// Orthonormal columns that span those of the input, to float64 rounding, by shifted Cholesky QR done three times. The
/// shift lets the Cholesky decomposition succeed on any input. A direction of size t among columns of norm 1 grows to
/// t / sqrt(t^2 + shift) in each round, which reaches 1 from 1e-13, and what is exactly 0 stays 0.
void orthonormalise(const HandleLease& lease, int64_t count, const Orthonormalisation& work);

}  // namespace csulora::cuda
