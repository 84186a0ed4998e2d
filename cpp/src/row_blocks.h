#pragma once

#include <algorithm>
#include <cstdint>

namespace csulora {

/// Calls visit(first_row, row_count) for consecutive blocks of about a million entries of a rows x columns matrix, so
/// that a copy of one block in another type stays small beside the matrix.
template <typename Visit>
void for_row_blocks(int64_t rows, int64_t columns, Visit visit) {
  constexpr int64_t kEntries = int64_t{1} << 20;
  const int64_t step = std::max<int64_t>(1, kEntries / columns);
  for (int64_t row = 0; row < rows; row += step) {
    visit(row, std::min(step, rows - row));
  }
}

}  // namespace csulora
