#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace csulora {

/// D = aligned - base with the two scalars that need a pass over both matrices.
struct Displacement {
  at::Tensor matrix;     ///< (m, n) float32
  double norm2 = 0;      ///< |D|_F^2, accumulated in float64
  double noise_std = 0;  ///< standard deviation of the storage rounding of one entry of D
};

/// Subtracts in float32, row block by row block, so that nothing but D itself is of size m x n.
///
/// @param noise_std  overrides the rounding noise computed from the dtypes and magnitudes
/// @throws InputError unless both are finite CPU matrices of one shape, float16, bfloat16 or float32
Displacement displacement(const at::Tensor& base, const at::Tensor& aligned, std::optional<double> noise_std);

}  // namespace csulora
