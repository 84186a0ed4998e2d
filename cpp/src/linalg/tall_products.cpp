#include "linalg/tall_products.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "linalg/tile.h"
#include "linalg/widest_vectors.h"

namespace csulora::tall {
namespace {

template <int kLanes>
using Floats __attribute__((vector_size(kLanes * sizeof(float)))) = float;
template <int kLanes>
using Indices __attribute__((vector_size(kLanes * sizeof(int32_t)))) = int32_t;

/// kRows rows of a matrix, from `row` on, times kColumns columns of the coordinates, from `column` on.
template <typename Tile>
CSULORA_INLINED void multiply_rows(MatrixView<const float> rows, int64_t row, MatrixView<const float> coordinates,
                                   int64_t column, Tile* product) {
  const float* const weights = rows.row(row);
  Tile sums = {};
  for (int64_t direction = 0; direction < coordinates.rows; ++direction) {
    sums.add(weights + direction, rows.stride, coordinates.row(direction) + column);
  }
  *product = sums;
}

/// Transposes kLanes rows of one vector each: exchanges the off-diagonal blocks of size `step`, then those of half the
/// size.
template <int kLanes, int step = kLanes / 2>
CSULORA_INLINED void transpose_square(Floats<kLanes>* square) {
  Indices<kLanes> upper, lower;
  CSULORA_UNROLLED
  for (int lane = 0; lane < kLanes; ++lane) {
    upper[lane] = lane & step ? kLanes + lane - step : lane;
    lower[lane] = lane & step ? kLanes + lane : lane + step;
  }
  CSULORA_UNROLLED
  for (int row = 0; row < kLanes; ++row) {
    if (!(row & step)) {
      const Floats<kLanes> above = square[row], below = square[row + step];
      square[row] = __builtin_shuffle(above, below, upper);
      square[row + step] = __builtin_shuffle(above, below, lower);
    }
  }
  if constexpr (step > 1) {
    transpose_square<kLanes, step / 2>(square);
  }
}

/// target (rows, columns) = block^T, for a block of kWidth rows and columns, neither of which it may exceed.
template <int kLanes>
CSULORA_INLINED void transpose_block(const float* block, float* target, int64_t stride, int64_t rows, int64_t columns,
                                     int64_t block_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {  // innermost, so that whole cache lines are written
      Floats<kLanes> square[kLanes];
      CSULORA_UNROLLED
      for (int64_t i = 0; i < kLanes; ++i) {
        load(&square[i], block + (column + i) * block_stride + row);
      }
      transpose_square<kLanes>(square);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - row); ++i) {
        float* const entries = target + (row + i) * stride + column;
        if (columns - column >= kLanes) {
          store(&square[i], entries);
        } else {
          std::memcpy(entries, &square[i], (columns - column) * sizeof(float));
        }
      }
    }
  }
}

/// Calls visit(wide, column), column by column: `wide`, a constant, is how many times kWidth columns are taken at once.
/// Twice as many spare loads, where a machine has the registers.
template <int kLanes, typename Visit>
CSULORA_INLINED void for_each_column(int64_t columns, Visit visit) {
  int64_t column = 0;
  if constexpr (kLanes == 16) {
    for (; column + 2 * kWidth <= columns; column += 2 * kWidth) {
      visit(std::integral_constant<int64_t, 2>(), column);
    }
  }
  for (; column < columns; column += kWidth) {
    visit(std::integral_constant<int64_t, 1>(), column);
  }
}

/// Calls visit(tall, row), row by row: `tall`, a constant, is how many times half the lanes are taken at once. Twice as
/// many where a tile has but one vector of columns, and a machine the registers.
template <int kLanes, int64_t kWide, typename Visit>
CSULORA_INLINED void for_each_row(int64_t first, int64_t last, Visit visit) {
  constexpr int64_t kStep = kLanes / 2;
  int64_t row = first;
  if constexpr (kLanes == 16 && kWide == 1) {
    for (; row + 2 * kStep <= last; row += 2 * kStep) {
      visit(std::integral_constant<int64_t, 2>(), row);
    }
  }
  for (; row < last; row += kStep) {
    visit(std::integral_constant<int64_t, 1>(), row);
  }
}

struct Project {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> basis, MatrixView<const float> factor,
                                  MatrixView<double> coordinates) {
    constexpr int64_t kStrip = 64;  // rows of a basis and a factor that stay in the first-level cache
    for (int64_t first = 0; first < basis.rows; first += kStrip) {
      const int64_t last = std::min(first + kStrip, basis.rows);
      for_each_column<kLanes>(coordinates.columns, [&](auto wide, int64_t column) __attribute__((always_inline)) {
        constexpr int64_t kWide = wide;
        const auto sum = [&](auto tall, int64_t direction) __attribute__((always_inline)) {
          Tile<kLanes, float, kWide, tall> sums = {};
          for (int64_t row = first; row < last; ++row) {
            sums.add(basis.row(row) + direction, 1, factor.row(row) + column);
          }
          sums.add_to(coordinates.row(direction) + column, coordinates.stride);
        };
        for_each_row<kLanes, kWide>(0, coordinates.rows, sum);
      });
    }
  }
};

/// Calls visit(wide, first, last, column) for blocks of rows times columns of coordinates (k, width): column by column
/// for as many rows as stay in the first-level cache beside a column of the coordinates.
template <int kLanes, int64_t kRows, typename Visit>
CSULORA_INLINED void for_each_block(int64_t rows, MatrixView<const float> coordinates, Visit visit) {
  constexpr int64_t kEntries = 4096;
  const int64_t strip = std::max<int64_t>(1, kEntries / std::max<int64_t>(1, coordinates.rows) / kRows) * kRows;
  for (int64_t first = 0; first < rows; first += strip) {
    for_each_column<kLanes>(coordinates.columns, [&](auto wide, int64_t column) __attribute__((always_inline)) {
      visit(wide, first, std::min(first + strip, rows), column);
    });
  }
}

struct Split {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> basis, MatrixView<const float> coordinates,
                                  MatrixView<float> columns) {
    const auto visit = [&](auto wide, int64_t first, int64_t last, int64_t column) __attribute__((always_inline)) {
      for (int64_t row = first; row < last; row += Tile<kLanes>::kRows) {
        float* const target = columns.row(row) + column;
        Tile<kLanes, float, wide> inside, outside;
        multiply_rows(basis, row, coordinates, column, &inside);
        outside.load_from(target + coordinates.columns, columns.stride);
        outside.subtract(inside);
        inside.store_to(target, columns.stride);
        outside.store_to(target + coordinates.columns, columns.stride);
      }
    };
    for_each_block<kLanes, Tile<kLanes>::kRows>(columns.rows, coordinates, visit);
  }
};

struct Multiply {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> columns, MatrixView<const float> coordinates,
                                  MatrixView<float> product) {
    const auto visit = [&](auto wide, int64_t first, int64_t last, int64_t column) __attribute__((always_inline)) {
      constexpr int64_t kWide = wide;
      const auto multiply = [&](auto tall, int64_t row) __attribute__((always_inline)) {
        Tile<kLanes, float, kWide, tall> sums;
        multiply_rows(columns, row, coordinates, column, &sums);
        sums.store_to(product.row(row) + column, product.stride);
      };
      for_each_row<kLanes, kWide>(first, last, multiply);
    };
    for_each_block<kLanes, Tile<kLanes>::kRows>(product.rows, coordinates, visit);
  }
};

struct MultiplyTransposed {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> columns, MatrixView<const float> coordinates,
                                  MatrixView<float> product) {
    float block[kWidth * 2 * kWidth] = {};
    const auto visit = [&](auto wide, int64_t first, int64_t last, int64_t column) __attribute__((always_inline)) {
      constexpr int64_t kWide = wide, kColumns = kWide * kWidth;
      for (int64_t row = first; row < last; row += kWidth) {
        const int64_t count = std::min(kWidth, product.columns - row);
        const auto multiply = [&](auto tall, int64_t i) __attribute__((always_inline)) {
          Tile<kLanes, float, kWide, tall> sums;
          multiply_rows(columns, row + i, coordinates, column, &sums);
          sums.store_to(block + i * kColumns, kColumns);
        };
        for_each_row<kLanes, kWide>(0, padded(count, kRowStep), multiply);
        for (int64_t i = 0; i < kColumns; i += kWidth) {
          transpose_block<kLanes>(block + i, product.row(column + i) + row, product.stride, kWidth, count, kColumns);
        }
      }
    };
    for_each_block<kLanes, kWidth>(product.columns, coordinates, visit);
  }
};

struct Transpose {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> source, MatrixView<float> target) {
    for (int64_t first = 0; first < source.rows; first += kWidth) {
      const int64_t count = std::min(kWidth, source.rows - first);
      float block[kWidth * kWidth] = {};
      for (int64_t column = 0; column < source.columns; column += kWidth) {
        const int64_t length = std::min(kWidth, source.columns - column);
        const float* from = source.row(first) + column;
        int64_t stride = source.stride;
        if (count < kWidth || length < kWidth) {
          for (int64_t i = 0; i < count; ++i) {
            std::copy_n(from + i * stride, length, block + i * kWidth);
          }
          from = block;
          stride = kWidth;
        }
        transpose_block<kLanes>(from, target.row(column) + first, target.stride, length, kWidth, stride);
      }
    }
  }
};

struct AddGram {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const float> columns, MatrixView<double> gram) {
    using Sums = Tile<kLanes, double>;
    constexpr int64_t kCount = 64, kStrip = Sums::kColumns;  // two strips of so many rows stay in the first-level cache
    const std::unique_ptr<double[]> widened(new double[kCount * columns.columns]);
    for (int64_t first = 0; first < columns.rows; first += kCount) {
      const int64_t count = std::min(kCount, columns.rows - first);
      for (int64_t column = 0; column < columns.columns; column += kStrip) {
        for (int64_t row = 0; row < count; ++row) {
          std::copy_n(columns.row(first + row) + column, kStrip, widened.get() + column * kCount + row * kStrip);
        }
      }
      for (int64_t left = 0; left < gram.rows; left += Sums::kRows) {
        const double* const weights = widened.get() + left / kStrip * kStrip * kCount + left % kStrip;
        for (int64_t right = 0; right < left + Sums::kRows; right += kStrip) {
          double* const target = gram.row(left) + right;
          Sums sums;
          sums.load_from(target, gram.stride);
          for (int64_t row = 0; row < count; ++row) {
            sums.add(weights + row * kStrip, 1, widened.get() + right * kCount + row * kStrip);
          }
          sums.store_to(target, gram.stride);
        }
      }
    }
  }
};

}  // namespace

void project(MatrixView<const float> basis, MatrixView<const float> factor, MatrixView<double> coordinates) {
  run_widest<Project>(basis, factor, coordinates);
}

void split(MatrixView<const float> basis, MatrixView<const float> coordinates, MatrixView<float> columns) {
  run_widest<Split>(basis, coordinates, columns);
}

void multiply(MatrixView<const float> columns, MatrixView<const float> coordinates, MatrixView<float> product) {
  run_widest<Multiply>(columns, coordinates, product);
}

void multiply_transposed(MatrixView<const float> columns, MatrixView<const float> coordinates,
                         MatrixView<float> product) {
  run_widest<MultiplyTransposed>(columns, coordinates, product);
}

void transpose(MatrixView<const float> source, MatrixView<float> target) { run_widest<Transpose>(source, target); }

void add_gram(MatrixView<const float> columns, MatrixView<double> gram) { run_widest<AddGram>(columns, gram); }

}  // namespace csulora::tall
