#include "extract/subtraction.h"

#include <cmath>
#include <cstring>

#include "linalg/widest_vectors.h"

namespace csulora {
namespace {

/// Neighbouring entries that are computed at once.
template <int kLanes>
struct Lanes {
  using Floats __attribute__((vector_size(kLanes * sizeof(float)))) = float;
  using Bits __attribute__((vector_size(kLanes * sizeof(uint32_t)))) = uint32_t;
  using HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t)))) = uint16_t;
  using Doubles __attribute__((vector_size(kLanes * sizeof(double)))) = double;
};

/// A format's two constants: squared spacings follow from powers of two by a product.
struct Grid {
  explicit Grid(StorageFormat format)
      : smallest(std::ldexp(1.0F, format.min_exponent)), scale2(std::ldexp(1.0, -2 * format.fraction_bits)) {}

  float smallest;
  double scale2;
};

template <int kLanes>
CSULORA_INLINED void add_spacings2(const typename Lanes<kLanes>::Floats& entries, const Grid& grid,
                                   typename Lanes<kLanes>::Doubles& sums) {
  constexpr uint32_t kExponentMask = 0x7f800000;
  // Clearing sign and fraction of a float32 leaves the power of two below its magnitude.
  typename Lanes<kLanes>::Bits bits;
  std::memcpy(&bits, &entries, sizeof bits);
  bits &= kExponentMask;
  typename Lanes<kLanes>::Floats powers;
  std::memcpy(&powers, &bits, sizeof powers);
  powers = powers < grid.smallest ? grid.smallest - typename Lanes<kLanes>::Floats{} : powers;
  const auto wide = __builtin_convertvector(powers, typename Lanes<kLanes>::Doubles);
  sums += wide * wide * grid.scale2;
}

/// Stores the nearest bfloat16 numbers, ties to even: the upper halves, after half of what the lower can hold is added.
template <int kLanes>
CSULORA_INLINED void store_low_precision(const typename Lanes<kLanes>::Floats& entries, uint16_t* low_precision) {
  typename Lanes<kLanes>::Bits bits;
  std::memcpy(&bits, &entries, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto halves = __builtin_convertvector(bits, typename Lanes<kLanes>::HalfBits);
  std::memcpy(low_precision, &halves, sizeof halves);
}

/// The sums of one column's entries, or of several neighbouring ones' at once.
template <int kLanes>
struct LaneSums {
  typename Lanes<kLanes>::Doubles norm2 = {};
  typename Lanes<kLanes>::Doubles variances = {};

  CSULORA_INLINED void add_to(RowSums& sums) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.norm2 += norm2[lane];
      sums.variances += variances[lane];
    }
  }
};

template <int kLanes>
CSULORA_INLINED void subtract(const float* base, const Grid& base_grid, const float* aligned, const Grid& aligned_grid,
                              float* difference, uint16_t* low_precision, double* column_variances,
                              LaneSums<kLanes>& sums) {
  typename Lanes<kLanes>::Floats before, after;
  std::memcpy(&before, base, sizeof before);
  std::memcpy(&after, aligned, sizeof after);
  const typename Lanes<kLanes>::Floats moved = after - before;
  std::memcpy(difference, &moved, sizeof moved);
  if (low_precision) {
    store_low_precision<kLanes>(moved, low_precision);
  }
  const auto wide = __builtin_convertvector(moved, typename Lanes<kLanes>::Doubles);
  const auto norm2 = wide * wide;
  sums.norm2 += norm2;

  using Doubles = typename Lanes<kLanes>::Doubles;
  Doubles spacings2 = {};
  add_spacings2<kLanes>(before, base_grid, spacings2);
  add_spacings2<kLanes>(after, aligned_grid, spacings2);
  // extract/noise_edge.h says why
  const auto variances = spacings2 * (norm2 >= 2 * spacings2 ? Doubles{} + 1.0 / 12 : Doubles{} + 1.0 / 8);
  sums.variances += variances;
  typename Lanes<kLanes>::Doubles column;
  std::memcpy(&column, column_variances, sizeof column);
  column += variances;
  std::memcpy(column_variances, &column, sizeof column);
}

struct SubtractRow {
  template <int kFloats>
  CSULORA_INLINED static RowSums run(const StoredRow& base, const StoredRow& aligned, int64_t columns,
                                     const DifferenceRow& difference, double* column_variances) {
    constexpr int kLanes = kFloats / 2;  // so that the sums in float64 fill a register
    const auto low_precision = [&](int64_t column) {
      return difference.low_precision ? difference.low_precision + column : nullptr;
    };
    const Grid base_grid(base.format), aligned_grid(aligned.format);
    LaneSums<kLanes> lanes;
    LaneSums<1> rest;
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      subtract<kLanes>(base.entries + i, base_grid, aligned.entries + i, aligned_grid, difference.entries + i,
                       low_precision(i), column_variances + i, lanes);
    }
    for (; i < columns; ++i) {
      subtract<1>(base.entries + i, base_grid, aligned.entries + i, aligned_grid, difference.entries + i,
                  low_precision(i), column_variances + i, rest);
    }
    RowSums sums;
    lanes.add_to(sums);
    rest.add_to(sums);
    return sums;
  }
};

}  // namespace

RowSums subtract_row(const StoredRow& base, const StoredRow& aligned, int64_t columns, const DifferenceRow& difference,
                     double* column_variances) {
  return run_widest<SubtractRow>(base, aligned, columns, difference, column_variances);
}

}  // namespace csulora
