#pragma once

#include <ATen/core/Tensor.h>

#include "linalg/small_matrix.h"

namespace csulora {

/// One factor F (m, r) of an update, split at its side's subspace: columns = [inside, outside], where
/// inside = basis basis^T F and inside + outside = F.
struct SplitFactor {
  SmallMatrix coordinates;  ///< (k, r) basis^T F
  at::Tensor columns;       ///< (m, 2, r) float64; or float32, with m and r padded by zeros for `tall`
  SmallMatrix gram;         ///< (2r, 2r) columns^T columns
  int64_t rows = 0;         ///< m
};

/// Products in float32, their sums over blocks of rows in float64. Each column of either half is off by about
/// kFloatRounding times the norm of the column of F; `gram` is exact for the columns as they came out.
///
/// `factor` (m, r) and `basis` (m, k) are float16, bfloat16 or float32, of any strides; F = scale * factor. `columns`
/// lie in `memory`, which grows as needed.
SplitFactor split_in_float(const at::Tensor& factor, double scale, const at::Tensor& basis, at::Tensor& memory);

/// The same in float64, which takes several times as long: for a factor that may be float64 itself, or of which all but
/// a millionth may lie on one side, and that millionth be what is kept.
SplitFactor split_in_double(const at::Tensor& factor, double scale, const at::Tensor& basis);

/// (j, 2r) with root^T root = gram, which must be finite.
SmallMatrix root(const SplitFactor& split);

/// columns mixture, (m, j) of the dtype of the columns, for a mixture (2r, j).
at::Tensor combined(const SplitFactor& split, const SmallMatrix& mixture);

/// The same transposed, (j, m).
at::Tensor combined_rows(const SplitFactor& split, const SmallMatrix& mixture);

inline constexpr double kFloatRounding = 0x1p-24;
inline constexpr double kDoubleRounding = 0x1p-53;

}  // namespace csulora
