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

/// The variance of what rounding adds to aligned - base.
template <typename Base, typename Aligned>
__device__ double rounding_variance(Base base, Aligned aligned) {
  const double moved = widened(aligned) - widened(base);
  const double spacings2 = spacing2(base) + spacing2(aligned);
  return moved * moved >= 2 * spacings2 ? spacings2 / 12 : spacings2 / 8;
}

/// One block per row at a time.
template <typename Base, typename Aligned>
__global__ void subtract_rows(const Base* base, const Aligned* aligned, int64_t rows, int64_t columns,
                              float* difference, DisplacementSums sums) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double norm2 = 0;
    double noise = 0;
    for (int64_t i = row * columns + threadIdx.x; i < (row + 1) * columns; i += kThreads) {
      const float entry = widened(aligned[i]) - widened(base[i]);
      difference[i] = entry;
      norm2 += double{entry} * entry;
      noise += rounding_variance(base[i], aligned[i]);
    }
    norm2 = block_sum(norm2);
    noise = block_sum(noise);
    if (threadIdx.x == 0) {
      sums.row_norms2[row] = norm2;
      sums.row_noise[row] = noise;
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
  double noise = 0;
  for (int64_t row = first; row < last; ++row) {
    noise += rounding_variance(base[row * columns + column], aligned[row * columns + column]);
  }
  sums.column_noise[blockIdx.y * columns + column] = noise;
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
