#pragma once

#include <cstdint>

#include "extract/noise_edge.h"

namespace csulora {

/// The grid that a checkpoint's entries were rounded to: spacing 2^-fraction_bits between 1 and 2, and that of the
/// smallest normal number, 2^min_exponent, below it.
struct StorageFormat {
  int fraction_bits;
  int min_exponent;
};

/// Entries of one checkpoint's row, widened, and their format.
struct StoredRow {
  const float* entries;
  StorageFormat format;
};

/// Where a row of the difference goes.
struct DifferenceRow {
  float* entries;
  uint16_t* low_precision;  ///< the nearest bfloat16 numbers, or null: not asked for
};

struct RowSums {
  double norm2 = 0;  ///< squares of the difference
  RoundingSums rounding;
};

/// Rounding sums of columns, (columns) each.
struct ColumnSums {
  double* variances;
  double* near;
  double* stepped;
};

/// difference = aligned - base for one row, in one pass over it.
///
/// @param column_sums  (columns) float64 each, the row's entries are added
RowSums subtract_row(const StoredRow& base, const StoredRow& aligned, int64_t columns, const DifferenceRow& difference,
                     const ColumnSums& column_sums);

}  // namespace csulora
