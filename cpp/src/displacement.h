#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace csulora {

/// D = aligned - base with the two scalars that need a pass over both matrices.
struct Displacement {
  at::Tensor matrix;      ///< (m, n) float32
  double norm2 = 0;       ///< |D|_F^2, accumulated in float64
  double noise_edge = 0;  ///< what the largest singular value of both matrices' storage rounding can reach
};

/// Subtracts in float32, row block by row block, so that nothing but D itself is of size m x n.
///
/// Rounding leaves errors of variance v_ij that do not depend on each other. The norm of such a matrix is at most about
/// max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij) (Bandeira & van Handel 2016), which is sigma (sqrt m + sqrt n)
/// where the variance is the same everywhere, and also covers rows or columns that are larger than the rest.
///
/// @param noise_std  takes the place of every sqrt(v_ij), which otherwise follow from the dtypes and magnitudes
/// @throws InputError unless both are finite CPU matrices of one shape, float16, bfloat16 or float32
Displacement displacement(const at::Tensor& base, const at::Tensor& aligned, std::optional<double> noise_std);

}  // namespace csulora
