#include "linalg/conversion.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

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

/// One row at a time. Compilers do not make vectors of conversions of float16; those have functions of their own below.
template <typename Stored>
struct WidenRow {
  template <int kLanes>
  CSULORA_INLINED static void run(const Stored* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i];
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
void widen_row(const Stored* from, float* to, int64_t count) {
  run_widest<WidenRow<Stored>>(from, to, count);
}

template <typename Stored>
void narrow_row(const float* from, Stored* to, int64_t count) {
  run_widest<NarrowRow<Stored>>(from, to, count);
}

#ifdef CSULORA_HAS_F16C
__attribute__((target("avx,f16c"))) void widen_by_f16c(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) {
    to[i] = _cvtsh_ss(from[i].x);
  }
}

__attribute__((target("avx512f,f16c"))) void widen_by_avx512(const Half* from, float* to, int64_t count) {
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    _mm512_storeu_ps(to + i,
                     _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
  widen_by_f16c(from + whole, to + whole, count - whole);
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
void widen_row<Half>(const Half* from, float* to, int64_t count) {
  if (__builtin_cpu_supports("x86-64-v4")) {
    widen_by_avx512(from, to, count);
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    widen_by_f16c(from, to, count);
  } else {
    run_widest<WidenRow<Half>>(from, to, count);
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

/// Rows without gaps are one long row.
template <typename Visit>
void for_each_row(int64_t rows, int64_t columns, bool without_gaps, Visit visit) {
  if (without_gaps) {
    return visit(0, rows * columns);
  }
  for (int64_t row = 0; row < rows; ++row) {
    visit(row, columns);
  }
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
    const auto* const entries = static_cast<const decltype(stored)*>(from);
    const bool without_gaps = stride == target.columns && target.stride == target.columns;
    for_each_row(target.rows, target.columns, without_gaps,
                 [&](int64_t row, int64_t count) { widen_row(entries + row * stride, target.row(row), count); });
  });
}

float narrow(MatrixView<const float> matrix, c10::ScalarType dtype, void* target) {
  uint32_t largest = 0;
  with_type(dtype, [&](auto stored) {
    auto* const entries = static_cast<decltype(stored)*>(target);
    constexpr int64_t kPiece = 4096;  // entries that stay in the first-level cache
    for_each_row(matrix.rows, matrix.columns, matrix.stride == matrix.columns, [&](int64_t row, int64_t count) {
      for (int64_t first = 0; first < count; first += kPiece) {
        const float* const piece = matrix.row(row) + first;
        const int64_t length = std::min(kPiece, count - first);
        largest = std::max(largest, run_widest<LargestBits>(piece, length));
        narrow_row(piece, entries + row * matrix.columns + first, length);
      }
    });
  });
  return std::bit_cast<float>(largest);
}

}  // namespace csulora
