#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "csulora/extract.h"

namespace csulora {

/// D = aligned - base with the two scalars that need a pass over both matrices.
struct Displacement {
  at::Tensor matrix;         ///< (m, n) float32
  double norm2 = 0;          ///< |D|_F^2, accumulated in float64
  double noise_edge = 0;     ///< what the largest singular value of both matrices' storage rounding can reach
  at::Tensor low_precision;  ///< (m, n) bfloat16, a copy of the matrix; undefined unless asked for and of use
};

/// Whether float32 products with D neither overflow nor lose digits; float64 takes the rest.
inline bool fits_float32(const Displacement& d) {
  const double norm = std::sqrt(d.norm2);
  return norm > 1e-18 && norm < 1e18;
}

/// The noise edge from the largest sum along a row and along a column of both matrices' squared spacings.
///
/// Two values rounded to grids of spacings h and h' differ by an error of variance (h^2 + h'^2) / 12 if they lie far
/// apart, and of up to h^2 / 4 if they lie half a spacing apart on one grid. (h^2 + h'^2) / 8 covers both.
inline double rounding_edge(double row, double column) { return (std::sqrt(row) + std::sqrt(column)) / std::sqrt(8.0); }

/// Subtracts in float32, row block by row block, so that nothing but D itself is of size m x n.
///
/// Rounding leaves errors of variance v_ij that do not depend on each other. The norm of such a matrix is at most about
/// max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij) (Bandeira & van Handel 2016), which is sigma (sqrt m + sqrt n)
/// where the variance is the same everywhere, and also covers rows or columns that are larger than the rest.
///
/// @param noise_std    takes the place of every sqrt(v_ij), which otherwise follow from the dtypes and magnitudes
/// @param with_low_precision  make the low-precision copy, where products with it are fast
/// @param workspace    where both are formed on a CPU, or null: in memory of their own
/// @throws InputError unless both are finite matrices of one shape on one device, float16, bfloat16 or float32
Displacement displacement(const at::Tensor& base, const at::Tensor& aligned, std::optional<double> noise_std,
                          bool with_low_precision = false, Workspace* workspace = nullptr);

}  // namespace csulora
