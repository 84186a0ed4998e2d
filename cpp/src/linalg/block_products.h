#pragma once

#include <ATen/core/Tensor.h>

namespace csulora {

/// Whether oneDNN's kernels for blocks of matrices multiply entries of this type, float32 or bfloat16, faster than
/// anything else does: the latter where the CPU multiplies vectors of pairs of them.
bool multiplies_blocks(at::ScalarType type);

/// out = rows matrix with those kernels, summed in float32. Where `out` is float64, sums in float32 have at most
/// kFloatTerms terms.
///
/// @param out     (b, n) float32, or float64 for factors in float32; contiguous
/// @param rows    (b, m) float32 or bfloat16, contiguous
/// @param matrix  (m, n) of the same type, contiguous or the transpose of a contiguous matrix
void multiply_blocks(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix);

}  // namespace csulora
