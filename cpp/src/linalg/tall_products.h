#pragma once

#include <cstdint>

#include "linalg/matrix_view.h"

/// Products of tall, narrow float32 matrices, for which BLAS spends its time in packing. `width` must be a multiple of
/// kWidth, `rows` and `k` multiples of kRowStep: pad with zeros. No matrix may overlap another.
namespace csulora::tall {

inline constexpr int64_t kWidth = 16;
inline constexpr int64_t kRowStep = 8;

constexpr int64_t padded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/// coordinates (k, width) += basis (rows, k)^T factor (rows, width), over 64 rows at a time in float32, so that equal
/// terms, whose rounding adds up, cost few digits.
void project(MatrixView<const float> basis, MatrixView<const float> factor, MatrixView<double> coordinates);

/// Splits columns = [_, F] (rows, 2 width) in place into [inside, F - inside] with inside = basis (rows, k) coordinates
/// (k, width).
void split(MatrixView<const float> basis, MatrixView<const float> coordinates, MatrixView<float> columns);

/// product (rows, width) = columns (rows, k) coordinates (k, width).
void multiply(MatrixView<const float> columns, MatrixView<const float> coordinates, MatrixView<float> product);

/// product (width, count) = coordinates (k, width)^T columns^T, for the first `count` of the rows of columns (rows, k).
void multiply_transposed(MatrixView<const float> columns, MatrixView<const float> coordinates,
                         MatrixView<float> product);

/// target (count, width) = source (width, count)^T. Both are any numbers; what follows a row of `target` up to a
/// multiple of kWidth is overwritten by zeros.
void transpose(MatrixView<const float> source, MatrixView<float> target);

/// gram (width, width) += columns (rows, width)^T columns in float64; only the lower triangle.
void add_gram(MatrixView<const float> columns, MatrixView<double> gram);

}  // namespace csulora::tall
