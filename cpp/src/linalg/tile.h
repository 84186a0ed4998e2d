#pragma once

#include <cstdint>
#include <cstring>

#include "linalg/tall_products.h"
#include "linalg/widest_vectors.h"

/// For loops over registers: GCC decides what lies in them before it unrolls loops of its own accord, and so keeps in
/// memory what those go over.
#define CSULORA_UNROLLED _Pragma("GCC unroll 16")

namespace csulora::tall {

template <typename Vector, typename Entry>
CSULORA_INLINED void load(Vector* entries, const Entry* from) {
  std::memcpy(entries, from, sizeof *entries);
}

template <typename Vector, typename Entry>
CSULORA_INLINED void store(const Vector* entries, Entry* to) {
  std::memcpy(to, entries, sizeof *entries);
}

/// A tile of kRows rows, kTall times half as many as a vector has lanes, and kColumns columns, kWide times kWidth,
/// which a loop keeps in registers: few enough that none is spilled, many enough that reading takes less time than
/// multiplying, and that no sum waits for its last term.
template <int kLanes, typename Entry = float, int64_t kWide = 1, int64_t kTall = 1>
struct Tile {
  using Vector __attribute__((vector_size(kLanes * sizeof(float)))) = Entry;
  static constexpr int64_t kRows = kTall * kLanes / 2;
  static constexpr int64_t kVectors = kWide * kWidth / kLanes;
  static constexpr int64_t kStep = sizeof(Vector) / sizeof(Entry);
  static constexpr int64_t kColumns = kVectors * kStep;
  Vector entries[kRows][kVectors];

  /// entries += weights row, for weights (kRows), `stride` apart, and a row (kColumns).
  CSULORA_INLINED void add(const Entry* weights, int64_t stride, const Entry* row) {
    CSULORA_UNROLLED
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      Vector others;
      load(&others, row + vector * kStep);
      CSULORA_UNROLLED
      for (int64_t i = 0; i < kRows; ++i) {
        entries[i][vector] += weights[i * stride] * others;
      }
    }
  }

  CSULORA_INLINED void subtract(const Tile& others) {
    CSULORA_UNROLLED
    for (int64_t i = 0; i < kRows; ++i) {
      CSULORA_UNROLLED
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        entries[i][vector] -= others.entries[i][vector];
      }
    }
  }

  CSULORA_INLINED void load_from(const Entry* rows, int64_t stride) {
    CSULORA_UNROLLED
    for (int64_t i = 0; i < kRows; ++i) {
      CSULORA_UNROLLED
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        load(&entries[i][vector], rows + i * stride + vector * kStep);
      }
    }
  }

  CSULORA_INLINED void add_to(double* rows, int64_t stride) const {
    Entry terms[kRows * kColumns];
    store_to(terms, kColumns);
    for (int64_t i = 0; i < kRows; ++i) {
      double* const sums = rows + i * stride;
      for (int64_t j = 0; j < kColumns; ++j) {
        sums[j] += terms[i * kColumns + j];
      }
    }
  }

  CSULORA_INLINED void store_to(Entry* rows, int64_t stride) const {
    CSULORA_UNROLLED
    for (int64_t i = 0; i < kRows; ++i) {
      CSULORA_UNROLLED
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        store(&entries[i][vector], rows + i * stride + vector * kStep);
      }
    }
  }
};

}  // namespace csulora::tall
