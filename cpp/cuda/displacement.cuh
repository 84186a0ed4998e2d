#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace csulora::cuda {

/// One checkpoint's matrix, (rows, columns) row-major, and the format it is rounded to.
struct StoredMatrix {
  const void* data;
  Element element;
};

/// Rows that one sum over a column covers.
inline constexpr int64_t kRowsPerSum = 256;

/// What is measured while subtracting, all float64 on the device and written.
struct DisplacementSums {
  double* row_norms2;       ///< (rows) |row of D|^2
  double* row_rounding;     ///< (3, rows) the rounding sums of each row: variances, near, stepped
  double* column_rounding;  ///< (3, ceil(rows / kRowsPerSum), columns) the same down the column, in parts
};

/// difference (rows, columns) = aligned - base in float32, row-major, in one pass over both, and the sums in a second.
/// Enqueued on the stream; nothing waits.
///
/// @throws DeviceError
void subtract(const StoredMatrix& base, const StoredMatrix& aligned, int64_t rows, int64_t columns, float* difference,
              const DisplacementSums& sums, cudaStream_t stream);

}  // namespace csulora::cuda
