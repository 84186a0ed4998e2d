#pragma once

#include <ATen/core/Tensor.h>

namespace csulora {

/// Whether products with a bfloat16 copy of `matrix`, summed in float32, are several times as fast as with itself.
bool has_fast_bfloat16(const at::Tensor& matrix);

/// out = rows matrix, summed in float32.
///
/// @param out     (b, n) float32, contiguous
/// @param rows    (b, m) float32, contiguous
/// @param matrix  (m, n) float32; or bfloat16, contiguous or the transpose of a contiguous matrix: the rows are then
///                rounded to bfloat16, too
void multiply(at::Tensor out, const at::Tensor& rows, const at::Tensor& matrix);

}  // namespace csulora
