#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "csulora/annihilation.h"
#include "linalg/row_blocks.h"
#include "runtime/check.h"
#include "runtime/torch_guards.h"
#include "runtime/workers.h"

namespace csulora {
namespace {

using at::Tensor;

/// A bijection of 64 bits whose values for consecutive arguments look independent (SplitMix64).
uint64_t mixed(uint64_t bits) {
  bits += 0x9e3779b97f4a7c15;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
  return bits ^ (bits >> 31);
}

/// A number in (0, 1).
double uniform(uint64_t bits) { return (static_cast<double>(mixed(bits) >> 11) + 0.5) * 0x1p-53; }

/// Two Gaussian numbers at a time (Box and Muller), by formulas that every processor rounds alike to a few digits.
void fill_gaussian(uint64_t stream, int64_t columns, float scale, float* row) {
  constexpr double kTurn = 6.283185307179586;
  for (int64_t column = 0; column < columns; column += 2) {
    const double radius = scale * std::sqrt(-2 * std::log(uniform(stream + column)));
    const double angle = kTurn * uniform(stream + column + 1);
    row[column] = static_cast<float>(radius * std::cos(angle));
    if (column + 1 < columns) {
      row[column + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
}

/// G / sqrt(columns) (rows, columns).
Tensor gaussian(int64_t rows, int64_t columns, uint64_t seed) {
  constexpr int64_t kBlock = 256;
  auto matrix = at::empty({rows, columns}, at::kFloat);
  auto* entries = matrix.mutable_data_ptr<float>();
  const float scale = 1 / std::sqrt(static_cast<float>(columns));
  for_each_in_parallel((rows + kBlock - 1) / kBlock, [&](size_t block) {
    const int64_t first = static_cast<int64_t>(block) * kBlock;
    for (int64_t row = first; row < std::min(first + kBlock, rows); ++row) {
      fill_gaussian(mixed(mixed(seed) ^ row), columns, scale, entries + row * columns);
    }
  });
  return matrix;
}

Tensor sketch(const Tensor& matrix, const Tensor& numbers) {
  auto result = at::empty({matrix.size(0), numbers.size(1)}, numbers.options());
  for_row_blocks(matrix.size(0), matrix.size(1), [&](int64_t row, int64_t count) {
    auto rows = result.narrow(0, row, count);
    at::mm_out(rows, matrix.narrow(0, row, count).to(numbers.scalar_type()), numbers);
  });
  return result;
}

}  // namespace

std::vector<Tensor> sketches(const std::vector<Tensor>& matrices, int64_t columns, uint64_t seed,
                             at::ScalarType dtype) {
  check(dtype == at::kFloat || dtype == at::kDouble, "sketches in ", c10::toString(dtype),
        " are asked for; float32 or float64 is needed");
  check(columns >= 1, "a sketch of ", columns, " columns is asked for; it needs 1 or more");
  int64_t longest = 0;
  for (const auto& matrix : matrices) {
    check_matrix(matrix, "a matrix to sketch");
    check(matrix.is_cpu(), "a matrix to sketch is on ", matrix.device().str(), "; move it to the CPU");
    longest = std::max(longest, matrix.size(1));
  }
  const TorchGuards torch_guards;
  const auto numbers = gaussian(longest, columns, seed).to(dtype);
  std::vector<Tensor> found(matrices.size());
  for_each_in_parallel(matrices.size(), [&](size_t i) {
    const TorchGuards guards_of_thread;
    found[i] = sketch(matrices[i], numbers.narrow(0, 0, matrices[i].size(1)));
  });
  return found;
}

}  // namespace csulora
