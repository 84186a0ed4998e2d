#include "linalg/outer_products.h"

#include <algorithm>

#include "linalg/tile.h"
#include "linalg/widest_vectors.h"

namespace csulora::outer {
namespace {

/// Copies the tile that a matrix ends in, with zeros where there is nothing.
template <typename Tile>
void copy_corner(MatrixView<const float> matrix, int64_t row, int64_t column, float* corner) {
  std::fill_n(corner, Tile::kRows * Tile::kColumns, 0.0F);
  for (int64_t i = row; i < std::min(row + Tile::kRows, matrix.rows); ++i) {
    std::copy_n(matrix.row(i) + column, std::min(Tile::kColumns, matrix.columns - column),
                corner + (i - row) * Tile::kColumns);
  }
}

struct AddProducts {
  /// Short pieces of rows are nothing that a CPU foresees.
  template <typename Tile>
  CSULORA_INLINED static void prefetch(MatrixView<const float> matrix, int64_t row, int64_t column) {
    constexpr int64_t kRowsAhead = 16, kCacheLine = 64 / sizeof(float);
    for (int64_t i = row + kRowsAhead; i < row + kRowsAhead + Tile::kRows; ++i) {
      for (int64_t j = column; j < column + Tile::kColumns; j += kCacheLine) {
        __builtin_prefetch(matrix.row(i) + j, /*rw=*/0, /*locality=*/2);
      }
    }
  }

  /// Adds the products of a tile that stays in registers.
  ///
  /// @param factor  rows of it that belong to the tile's, b entries each
  /// @param sums    from the tile's first column on
  template <typename Tile>
  CSULORA_INLINED static void add_tile(const Tile& tile, const float* factor, int64_t b, float* sums) {
    for (int64_t i = 0; i < b; ++i) {
      typename Tile::Vector row[Tile::kVectors];
      const auto target = [=](int64_t vector) __attribute__((always_inline)) {
        const int64_t column = vector * Tile::kStep;
        return sums + (column / kWidth * b + i) * kWidth + column % kWidth;
      };
      CSULORA_UNROLLED
      for (int64_t vector = 0; vector < Tile::kVectors; ++vector) {
        tall::load(&row[vector], target(vector));
      }
      CSULORA_UNROLLED
      for (int64_t j = 0; j < Tile::kRows; ++j) {
        const float weight = factor[j * b + i];
        CSULORA_UNROLLED
        for (int64_t vector = 0; vector < Tile::kVectors; ++vector) {
          row[vector] += weight * tile.entries[j][vector];
        }
      }
      CSULORA_UNROLLED
      for (int64_t vector = 0; vector < Tile::kVectors; ++vector) {
        tall::store(&row[vector], target(vector));
      }
    }
  }

  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> matrix, MatrixView<const float> factor, float* sums) {
    using Tile = tall::Tile<kLanes, float, std::max(1, kLanes / 8)>;  // two vectors at least for each weight
    float corner[Tile::kRows * Tile::kColumns];
    for (int64_t row = 0; row < matrix.rows; row += Tile::kRows) {
      for (int64_t column = 0; column < matrix.columns; column += Tile::kColumns) {
        prefetch<Tile>(matrix, row, column);
        const float* entries = matrix.row(row) + column;
        int64_t stride = matrix.stride;
        if (row + Tile::kRows > matrix.rows || column + Tile::kColumns > matrix.columns) {
          copy_corner<Tile>(matrix, row, column, corner);
          entries = corner;
          stride = Tile::kColumns;
        }
        Tile tile;
        tile.load_from(entries, stride);
        add_tile(tile, factor.row(row), factor.columns, sums + column * factor.columns);
      }
    }
  }
};

}  // namespace

void add_products(MatrixView<const float> matrix, MatrixView<const float> factor, float* sums) {
  run_widest<AddProducts>(matrix, factor, sums);
}

}  // namespace csulora::outer
