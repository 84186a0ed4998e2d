#pragma once

#include <cstdint>

/// Products of tall, narrow float32 matrices with rows contiguous, for which BLAS spends its time in packing. Widths
/// must be multiples of kWidth, the number of rows a multiple of kRowStep: pad with zeros. No pointer may overlap
/// another.
namespace csulora::tall {

inline constexpr int64_t kWidth = 16;
inline constexpr int64_t kRowStep = 8;

constexpr int64_t padded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/// coordinates (k, width) += basis (rows, k)^T factor, over 64 rows at a time in float32, so that equal terms, whose
/// rounding adds up, cost few digits. `factor` has `width` columns and `stride` entries per row.
void project(const float* basis, int64_t rows, int64_t k, const float* factor, int64_t width, int64_t stride,
             double* coordinates);

/// Splits [_, F] (rows, 2 width) in place into [inside, F - inside] with inside = basis (rows, k) coordinates (k,
/// width).
void split(const float* basis, int64_t rows, int64_t k, const float* coordinates, int64_t width, float* columns);

/// product (rows, width) = columns (rows, k) coordinates (k, width).
void multiply(const float* columns, int64_t rows, int64_t k, const float* coordinates, int64_t width, float* product);

/// The same transposed: product (width, rows). `rows` is any number; `columns` are padded all the same.
void multiply_transposed(const float* columns, int64_t rows, int64_t k, const float* coordinates, int64_t width,
                         float* product);

/// target (count, width) = scale * source (width, count)^T, rows `source_stride` and `stride` entries apart. `width`
/// and `count` are any numbers; what follows a row of `target` up to a multiple of kWidth is overwritten by zeros.
void transpose(const float* source, int64_t width, int64_t count, int64_t source_stride, float scale, float* target,
               int64_t stride);

/// gram (width, width) += columns (rows, width)^T columns in float64; only the lower triangle.
void add_gram(const float* columns, int64_t rows, int64_t width, double* gram);

}  // namespace csulora::tall
