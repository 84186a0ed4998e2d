#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace csulora {

/// Whether products with a bfloat16 copy of `matrix`, summed in float32, are several times as fast as with itself.
bool has_fast_bfloat16(const at::Tensor& matrix);

/// Terms of a sum in float32 before float64 takes over, where sums have to be more accurate than float32 is.
inline constexpr int64_t kFloatTerms = 64;

/// out = rows matrix, summed in float32; where `out` is float64, over kFloatTerms terms at a time.
///
/// @param out     (b, n) float32, or float64 for a float32 matrix; contiguous
/// @param rows    (b, m) float32
/// @param matrix  (m, n) float32; or bfloat16, contiguous or the transpose of a contiguous matrix: the rows are then
///                rounded to bfloat16, too
void multiply(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix);

/// out += scale left right: (b, n), (b, m), (m, n) of one type, on several threads where they are large.
void add_product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, double scale);

/// left right, made like that.
at::Tensor product(const at::Tensor& left, const at::Tensor& right);

/// left right^T, with the fewer rows on the right: (b, m), (c, m) of one type, on several threads where `left` is
/// large.
at::Tensor inner_products(const at::Tensor& left, const at::Tensor& right);

}  // namespace csulora
