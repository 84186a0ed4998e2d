#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "linalg/matrix_view.h"

/// Conversion between float32 and what matrices are stored in: float16, bfloat16 and float32 itself. Beside some
/// thousand entries a call of ATen takes longer than its work.
namespace csulora {

/// Reads the first columns of rows that lie `stride` entries apart.
///
/// @param from   entries of `dtype`
/// @param target  (rows, columns), whose rows may lie further apart
void widen(const void* from, c10::ScalarType dtype, int64_t stride, MatrixView<float> target);

/// Rounds a matrix to nearest, ties to even, into rows that lie `stride` entries apart.
///
/// @param target  entries of `dtype`
/// @return the largest magnitude before rounding; NaN if an entry is
float narrow(MatrixView<const float> matrix, c10::ScalarType dtype, void* target, int64_t stride);

}  // namespace csulora
