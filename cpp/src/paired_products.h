#pragma once

#include <ATen/core/Tensor.h>

namespace csulora {

/// Whether the CPU multiplies vectors of pairs of bfloat16 numbers, which oneDNN's kernels make use of.
bool multiplies_pairs();

/// out = rows matrix in bfloat16, summed in float32, for a CPU that multiplies pairs of entries.
///
/// @param out     (b, n) float32, contiguous
/// @param rows    (b, m) bfloat16, contiguous
/// @param matrix  (m, n) bfloat16, contiguous or the transpose of a contiguous matrix
void multiply_pairs(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix);

}  // namespace csulora
