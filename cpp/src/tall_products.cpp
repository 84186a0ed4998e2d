#include "tall_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "every_x86.h"

namespace csulora::tall {
namespace {

// A loop keeps kRowStep of these in registers and reads one more, so that no entry is loaded twice.
using Floats = float __attribute__((vector_size(kWidth * sizeof(float))));
constexpr int64_t kDoubles = 8;
using Doubles = double __attribute__((vector_size(kDoubles * sizeof(double))));

CSULORA_INLINED void load(Floats* entries, const float* from) { std::memcpy(entries, from, sizeof *entries); }
CSULORA_INLINED void store(const Floats* entries, float* to) { std::memcpy(to, entries, sizeof *entries); }

/// sums = kRowStep rows of k entries each times kWidth columns of coordinates, `stride` entries apart.
CSULORA_INLINED void multiply_rows(const float* rows, int64_t k, const float* coordinates, int64_t stride,
                                   Floats* sums) {
  Floats held[kRowStep] = {};
  for (int64_t direction = 0; direction < k; ++direction) {
    Floats entries;
    load(&entries, coordinates + direction * stride);
    for (int64_t i = 0; i < kRowStep; ++i) {
      held[i] += rows[i * k + direction] * entries;
    }
  }
  std::copy_n(held, kRowStep, sums);
}

/// Exchanges the off-diagonal blocks of size `step` of a square tile.
template <int step>
CSULORA_INLINED void exchange_blocks(Floats* tile) {
  using Indices = int32_t __attribute__((vector_size(sizeof(Floats))));
  Indices upper, lower;
  for (int lane = 0; lane < kWidth; ++lane) {
    upper[lane] = lane & step ? kWidth + lane - step : lane;
    lower[lane] = lane & step ? kWidth + lane : lane + step;
  }
  for (int row = 0; row < kWidth; ++row) {
    if (!(row & step)) {
      const Floats above = tile[row], below = tile[row + step];
      tile[row] = __builtin_shuffle(above, below, upper);
      tile[row + step] = __builtin_shuffle(above, below, lower);
    }
  }
}

/// Transposes a tile of kWidth rows.
CSULORA_INLINED void transpose_tile(Floats* tile) {
  static_assert(kWidth == 16);
  exchange_blocks<8>(tile);
  exchange_blocks<4>(tile);
  exchange_blocks<2>(tile);
  exchange_blocks<1>(tile);
}

}  // namespace

CSULORA_FOR_EVERY_X86 void project(const float* basis, int64_t rows, int64_t k, const float* factor, int64_t width,
                                   int64_t stride, float* coordinates) {
  for (int64_t column = 0; column < width; column += kWidth) {
    for (int64_t direction = 0; direction < k; direction += kRowStep) {
      Floats sums[kRowStep] = {};
      for (int64_t row = 0; row < rows; ++row) {
        Floats entries;
        load(&entries, factor + row * stride + column);
        for (int64_t i = 0; i < kRowStep; ++i) {
          sums[i] += basis[row * k + direction + i] * entries;
        }
      }
      for (int64_t i = 0; i < kRowStep; ++i) {
        store(&sums[i], coordinates + (direction + i) * width + column);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void split(const float* basis, int64_t rows, int64_t k, const float* coordinates, int64_t width,
                                 float* columns) {
  for (int64_t row = 0; row < rows; row += kRowStep) {
    for (int64_t column = 0; column < width; column += kWidth) {
      Floats inside[kRowStep];
      multiply_rows(basis + row * k, k, coordinates + column, width, inside);
      for (int64_t i = 0; i < kRowStep; ++i) {
        float* const target = columns + (row + i) * 2 * width + column;
        Floats outside;
        load(&outside, target + width);
        outside -= inside[i];
        store(&inside[i], target);
        store(&outside, target + width);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void multiply(const float* columns, int64_t rows, int64_t k, const float* coordinates,
                                    int64_t width, float* product) {
  for (int64_t row = 0; row < rows; row += kRowStep) {
    for (int64_t column = 0; column < width; column += kWidth) {
      Floats sums[kRowStep];
      multiply_rows(columns + row * k, k, coordinates + column, width, sums);
      for (int64_t i = 0; i < kRowStep; ++i) {
        store(&sums[i], product + (row + i) * width + column);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void multiply_transposed(const float* columns, int64_t rows, int64_t k, const float* coordinates,
                                               int64_t width, float* product) {
  for (int64_t column = 0; column < width; column += kWidth) {
    for (int64_t row = 0; row < rows; row += kWidth) {
      Floats tile[kWidth] = {};
      for (int64_t half = 0; half < kWidth && row + half < rows; half += kRowStep) {
        multiply_rows(columns + (row + half) * k, k, coordinates + column, width, tile + half);
      }
      transpose_tile(tile);
      const int64_t count = std::min(kWidth, rows - row);
      for (int64_t i = 0; i < kWidth; ++i) {
        std::memcpy(product + (column + i) * rows + row, &tile[i], count * sizeof(float));
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void transpose(const float* source, int64_t width, int64_t count, int64_t source_stride,
                                     float scale, float* target, int64_t stride) {
  for (int64_t first = 0; first < width; first += kWidth) {
    for (int64_t column = 0; column < count; column += kWidth) {
      Floats tile[kWidth] = {};
      const int64_t length = std::min(kWidth, count - column);
      for (int64_t i = 0; i < std::min(kWidth, width - first); ++i) {
        std::memcpy(&tile[i], source + (first + i) * source_stride + column, length * sizeof(float));
      }
      transpose_tile(tile);
      for (int64_t i = 0; i < length; ++i) {
        tile[i] *= scale;
        store(&tile[i], target + (column + i) * stride + first);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void add_gram(const float* columns, int64_t rows, int64_t width, double* gram) {
  constexpr int64_t kEntries = 2048;  // in float64 they stay in the first-level cache
  const int64_t step = std::max(kRowStep, kEntries / width);
  std::vector<double> widened(step * width);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    std::copy_n(columns + first * width, count * width, widened.begin());
    for (int64_t left = 0; left < width; left += kDoubles) {
      for (int64_t right = 0; right <= left; right += kDoubles) {
        Doubles sums[kDoubles];
        for (int64_t i = 0; i < kDoubles; ++i) {
          std::memcpy(&sums[i], gram + (left + i) * width + right, sizeof sums[i]);
        }
        for (int64_t row = 0; row < count; ++row) {
          const double* const entries = widened.data() + row * width;
          Doubles others;
          std::memcpy(&others, entries + right, sizeof others);
          for (int64_t i = 0; i < kDoubles; ++i) {
            sums[i] += entries[left + i] * others;
          }
        }
        for (int64_t i = 0; i < kDoubles; ++i) {
          std::memcpy(gram + (left + i) * width + right, &sums[i], sizeof sums[i]);
        }
      }
    }
  }
}

}  // namespace csulora::tall
