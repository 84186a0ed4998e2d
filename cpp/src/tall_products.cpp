#include "tall_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "every_x86.h"

namespace csulora::tall {
namespace {

// Each loop keeps kRowStep of these in registers and reads one more, so that no entry is loaded twice.
using Floats = float __attribute__((vector_size(kWidth * sizeof(float))));
constexpr int64_t kDoubles = 8;
using Doubles = double __attribute__((vector_size(kDoubles * sizeof(double))));

}  // namespace

CSULORA_FOR_EVERY_X86 void project(const float* basis, int64_t rows, int64_t k, const float* factor, int64_t width,
                                   int64_t stride, float* coordinates) {
  for (int64_t column = 0; column < width; column += kWidth) {
    for (int64_t direction = 0; direction < k; direction += kRowStep) {
      Floats sums[kRowStep] = {};
      for (int64_t row = 0; row < rows; ++row) {
        Floats entries;
        std::memcpy(&entries, factor + row * stride + column, sizeof entries);
        for (int64_t i = 0; i < kRowStep; ++i) {
          sums[i] += basis[row * k + direction + i] * entries;
        }
      }
      for (int64_t i = 0; i < kRowStep; ++i) {
        std::memcpy(coordinates + (direction + i) * width + column, &sums[i], sizeof sums[i]);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void split(const float* basis, int64_t rows, int64_t k, const float* coordinates, int64_t width,
                                 float* columns) {
  for (int64_t row = 0; row < rows; row += kRowStep) {
    for (int64_t column = 0; column < width; column += kWidth) {
      Floats inside[kRowStep] = {};
      for (int64_t direction = 0; direction < k; ++direction) {
        Floats entries;
        std::memcpy(&entries, coordinates + direction * width + column, sizeof entries);
        for (int64_t i = 0; i < kRowStep; ++i) {
          inside[i] += basis[(row + i) * k + direction] * entries;
        }
      }
      for (int64_t i = 0; i < kRowStep; ++i) {
        float* const target = columns + (row + i) * 2 * width + column;
        Floats outside;
        std::memcpy(&outside, target + width, sizeof outside);
        outside -= inside[i];
        std::memcpy(target, &inside[i], sizeof inside[i]);
        std::memcpy(target + width, &outside, sizeof outside);
      }
    }
  }
}

CSULORA_FOR_EVERY_X86 void add_gram(const float* columns, int64_t rows, int64_t width, double* gram) {
  constexpr int64_t kRows = 64;  // in float64 they stay in the first-level cache
  std::vector<double> widened(kRows * width);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min(kRows, rows - first);
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
