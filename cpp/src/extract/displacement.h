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
  double noise_edge = 0;     ///< of both matrices' storage rounding, see extract/noise_edge.h
  at::Tensor low_precision;  ///< (m, n) bfloat16, a copy of the matrix; undefined unless asked for and of use
};

/// Whether float32 products with D neither overflow nor lose digits; float64 takes the rest.
inline bool fits_float32(const Displacement& d) {
  const double norm = std::sqrt(d.norm2);
  return norm > 1e-18 && norm < 1e18;
}

/// Subtracts in float32, row block by row block, so that nothing but D itself is of size m x n.
///
/// @param noise_std    standard deviation of an entry's rounding; absent: it follows from the dtypes and magnitudes
/// @param with_low_precision  make the low-precision copy, where products with it are fast
/// @param workspace    where both are formed on a CPU, or null: in memory of their own
/// @throws InputError unless both are finite matrices of one shape on one device, float16, bfloat16 or float32
Displacement displacement(const at::Tensor& base, const at::Tensor& aligned, std::optional<double> noise_std,
                          bool with_low_precision = false, Workspace* workspace = nullptr);

}  // namespace csulora
