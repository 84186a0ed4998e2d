#include "linalg/conversion.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "csulora/error.h"
#include "linalg/widest_vectors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define CSULORA_HAS_F16C
#endif

namespace csulora {
namespace {

using c10::BFloat16;
using c10::Half;

/// Compilers do not make vectors of conversions of float16; those have functions of their own below.
template <typename Stored>
struct WidenRows {
  template <int kLanes>
  CSULORA_INLINED static void run(MatrixView<const Stored> from, MatrixView<float> to) {
    for (int64_t i = 0; i < to.rows; ++i) {
      const Stored* const entries = from.row(i);
      float* const target = to.row(i);
      for (int64_t j = 0; j < to.columns; ++j) {
        target[j] = entries[j];
      }
    }
  }
};

template <typename Stored>
struct NarrowRow {
  template <int kLanes>
  CSULORA_INLINED static void run(const float* from, Stored* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i];
    }
  }
};

/// The bits of the largest magnitude: those of numbers without a sign are ordered as the numbers are, NaN above all.
struct LargestBits {
  template <int kLanes>
  CSULORA_INLINED static uint32_t run(const float* entries, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, std::bit_cast<uint32_t>(entries[i]) & 0x7fffffffu);
    }
    return largest;
  }
};

template <typename Stored>
void widen_rows(MatrixView<const Stored> from, MatrixView<float> to) {
  run_widest<WidenRows<Stored>>(from, to);
}

template <typename Stored>
void narrow_row(const float* from, Stored* to, int64_t count) {
  run_widest<NarrowRow<Stored>>(from, to, count);
}

#ifdef CSULORA_HAS_F16C
__attribute__((target("avx,f16c"))) void widen_row_by_f16c(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) {
    to[i] = _cvtsh_ss(from[i].x);
  }
}

__attribute__((target("avx,f16c"))) void widen_by_f16c(MatrixView<const Half> from, MatrixView<float> to) {
  for (int64_t i = 0; i < to.rows; ++i) {
    widen_row_by_f16c(from.row(i), to.row(i), to.columns);
  }
}

__attribute__((target("avx512f,f16c"))) void widen_by_avx512(MatrixView<const Half> from, MatrixView<float> to) {
  const int64_t whole = to.columns / 16 * 16;
  for (int64_t i = 0; i < to.rows; ++i) {
    const Half* const entries = from.row(i);
    float* const target = to.row(i);
    for (int64_t j = 0; j < whole; j += 16) {
      const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries + j));
      _mm512_storeu_ps(target + j, _mm512_maskz_cvtph_ps(0xffff, stored));
    }
    if (whole < to.columns) {
      widen_row_by_f16c(entries + whole, target + whole, to.columns - whole);
    }
  }
}

__attribute__((target("avx,f16c"))) void narrow_by_f16c(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) {
    to[i].x = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

template <>
void widen_rows<Half>(MatrixView<const Half> from, MatrixView<float> to) {
  if (__builtin_cpu_supports("x86-64-v4")) {
    widen_by_avx512(from, to);
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    widen_by_f16c(from, to);
  } else {
    run_widest<WidenRows<Half>>(from, to);
  }
}

template <>
void narrow_row<Half>(const float* from, Half* to, int64_t count) {
  if (__builtin_cpu_supports("x86-64-v3")) {
    narrow_by_f16c(from, to, count);
  } else {
    run_widest<NarrowRow<Half>>(from, to, count);
  }
}
#endif

/// Whether all rows are one long row.
template <typename T>
bool has_no_gaps(MatrixView<T> matrix) {
  return matrix.stride == matrix.columns;
}

/// Calls visit(Stored{}) for the type that `dtype` names.
template <typename Visit>
void with_type(c10::ScalarType dtype, Visit visit) {
  switch (dtype) {
    case c10::kHalf:
      return visit(Half{});
    case c10::kBFloat16:
      return visit(BFloat16{});
    case c10::kFloat:
      return visit(float{});
    default:
      throw InternalError("unknown storage type");
  }
}

}  // namespace

void widen(const void* from, c10::ScalarType dtype, int64_t stride, MatrixView<float> target) {
  with_type(dtype, [&](auto stored) {
    MatrixView<const decltype(stored)> entries{static_cast<const decltype(stored)*>(from), target.rows, target.columns,
                                               stride};
    if (has_no_gaps(entries) && has_no_gaps(target)) {
      entries.columns = target.columns *= std::exchange(target.rows, 1);
    }
    widen_rows(entries, target);
  });
}

float narrow(MatrixView<const float> matrix, c10::ScalarType dtype, void* target, int64_t stride) {
  uint32_t largest = 0;
  with_type(dtype, [&](auto stored) {
    auto* const entries = static_cast<decltype(stored)*>(target);
    constexpr int64_t kPiece = 4096;  // entries that stay in the first-level cache
    if (has_no_gaps(matrix) && stride == matrix.columns) {
      matrix.columns *= std::exchange(matrix.rows, 1);
    }
    for (int64_t row = 0; row < matrix.rows; ++row) {
      for (int64_t first = 0; first < matrix.columns; first += kPiece) {
        const float* const piece = matrix.row(row) + first;
        const int64_t length = std::min(kPiece, matrix.columns - first);
        largest = std::max(largest, run_widest<LargestBits>(piece, length));
        narrow_row(piece, entries + row * stride + first, length);
      }
    }
  });
  return std::bit_cast<float>(largest);
}

}  // namespace csulora
