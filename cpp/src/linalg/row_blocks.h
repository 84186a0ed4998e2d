#pragma once

#include <algorithm>
#include <cstdint>

namespace csulora {

/// Rows of a matrix that make a block of about a million entries: a copy of it in another type stays small beside the
/// matrix.
inline int64_t rows_per_block(int64_t columns) {
  constexpr int64_t kEntries = int64_t{1} << 20;
  return kEntries / std::clamp<int64_t>(columns, 1, kEntries);
}

/// Calls visit(first_row, row_count) for consecutive blocks of a rows x columns matrix.
template <typename Visit>
void for_row_blocks(int64_t rows, int64_t columns, Visit visit) {
  const int64_t step = rows_per_block(columns);
  for (int64_t row = 0; row < rows; row += step) {
    visit(row, std::min(step, rows - row));
  }
}

}  // namespace csulora
