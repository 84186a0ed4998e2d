#include <cmath>

#include "displacement.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace csulora::cuda {
namespace {

/// Smallest normal number and spacing of the numbers in [1, 2).
template <typename T>
struct Format;
template <>
struct Format<__half> {
  static constexpr double kSmallest = 0x1p-14;
  static constexpr double kSpacing = 0x1p-10;
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr double kSmallest = 0x1p-126;
  static constexpr double kSpacing = 0x1p-7;
};
template <>
struct Format<float> {
  static constexpr double kSmallest = 0x1p-126;
  static constexpr double kSpacing = 0x1p-23;
};

/// The squared spacing between neighbouring storable numbers around a value.
template <typename T>
__device__ double spacing2(T stored) {
  const double value = std::fabs(double{widened(stored)});
  double power = Format<T>::kSmallest;
  if (value >= power) {
    power = std::ldexp(1.0, std::ilogb(value));
  }
  return power * power * (Format<T>::kSpacing * Format<T>::kSpacing);
}

/// As the core's: a bound on variances, and the squared spacings of entries that moved by at most one, and by one.
struct RoundingSums {
  double variances = 0;
  double near = 0;
  double stepped = 0;
};

template <typename Base, typename Aligned>
__device__ void add_rounding(Base base, Aligned aligned, RoundingSums& sums) {
  const double moved = widened(aligned) - widened(base);
  const double base_spacing2 = spacing2(base);
  const double aligned_spacing2 = spacing2(aligned);
  const double spacings2 = base_spacing2 + aligned_spacing2;
  if (moved * moved >= 2 * spacings2) {
    sums.variances += spacings2 / 12;
  } else if (base_spacing2 != aligned_spacing2) {
    sums.variances += spacings2 / 8;
  } else {
    sums.near += base_spacing2;
    sums.stepped += moved == 0 ? 0 : base_spacing2;
  }
}

/// One block per row at a time.
template <typename Base, typename Aligned>
__global__ void subtract_rows(const Base* base, const Aligned* aligned, int64_t rows, int64_t columns,
                              float* difference, DisplacementSums sums) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double norm2 = 0;
    RoundingSums rounding;
    for (int64_t i = row * columns + threadIdx.x; i < (row + 1) * columns; i += kThreads) {
      const float entry = widened(aligned[i]) - widened(base[i]);
      difference[i] = entry;
      norm2 += double{entry} * entry;
      add_rounding(base[i], aligned[i], rounding);
    }
    norm2 = block_sum(norm2);
    const double of_row[] = {block_sum(rounding.variances), block_sum(rounding.near), block_sum(rounding.stepped)};
    if (threadIdx.x == 0) {
      sums.row_norms2[row] = norm2;
      for (int64_t kind = 0; kind < 3; ++kind) {
        sums.row_rounding[kind * rows + row] = of_row[kind];
      }
    }
  }
}

/// One thread per column and kRowsPerSum rows.
template <typename Base, typename Aligned>
__global__ void sum_columns(const Base* base, const Aligned* aligned, int64_t rows, int64_t columns,
                            DisplacementSums sums) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) {
    return;
  }
  const int64_t first = blockIdx.y * kRowsPerSum;
  const int64_t last = first + kRowsPerSum < rows ? first + kRowsPerSum : rows;
  RoundingSums rounding;
  for (int64_t row = first; row < last; ++row) {
    add_rounding(base[row * columns + column], aligned[row * columns + column], rounding);
  }
  double* const of_part = sums.column_rounding + blockIdx.y * columns + column;
  const int64_t all_parts = gridDim.y * columns;
  of_part[0] = rounding.variances;
  of_part[all_parts] = rounding.near;
  of_part[2 * all_parts] = rounding.stepped;
}

}  // namespace

void subtract(const StoredMatrix& base, const StoredMatrix& aligned, int64_t rows, int64_t columns, float* difference,
              const DisplacementSums& sums, cudaStream_t stream) {
  const auto row_blocks = static_cast<unsigned>(std::min<int64_t>(rows, 65535));
  const dim3 column_blocks(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                           static_cast<unsigned>((rows + kRowsPerSum - 1) / kRowsPerSum));
  visit_element(base.element, [&](auto base_example) {
    visit_element(aligned.element, [&](auto aligned_example) {
      using Base = decltype(base_example);
      using Aligned = decltype(aligned_example);
      const auto* left = static_cast<const Base*>(base.data);
      const auto* right = static_cast<const Aligned*>(aligned.data);
      launch(subtract_rows<Base, Aligned>, dim3(row_blocks), stream, "subtract_rows", left, right, rows, columns,
             difference, sums);
      launch(sum_columns<Base, Aligned>, column_blocks, stream, "sum_columns", left, right, rows, columns, sums);
    });
  });
}

}  // namespace csulora::cuda
