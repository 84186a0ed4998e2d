#pragma once

#include "linalg/matrix_view.h"

/// Products with a float32 matrix whose rows lie far apart, as sums of outer products. The matrix is read once, row
/// after row, and what comes of a strip of its columns stays in the first-level cache meanwhile.
namespace csulora::outer {

inline constexpr int64_t kStrip = 64;   ///< the most columns of the matrix
inline constexpr int64_t kWidth = 16;   ///< columns of sums that lie together
inline constexpr int64_t kRowStep = 8;  ///< the factor has rows of zeros up to a multiple of this

/// sums (kStrip / kWidth, b, kWidth) += factor (rows, b)^T matrix (rows, columns); column j is
/// (j / kWidth, all, j % kWidth). Zeros are added where there is no column.
void add_products(MatrixView<const float> matrix, MatrixView<const float> factor, float* sums);

}  // namespace csulora::outer
