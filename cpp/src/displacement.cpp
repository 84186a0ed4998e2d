#include "displacement.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "check.h"

namespace csulora {
namespace {

using at::Tensor;

constexpr int64_t kRowBlockEntries = int64_t{1} << 20;  // 4 MiB of float32 per temporary

struct StorageFormat {
  int fraction_bits;
  int min_exponent;  // of the smallest normal number: below it the spacing stops shrinking
};

StorageFormat storage_format(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return {10, -14};
    case at::kBFloat16:
      return {7, -126};
    default:
      return {23, -126};
  }
}

/// Sum over entries of the squared spacing between neighbouring storable numbers around each entry.
double spacing_norm2(const Tensor& block, StorageFormat format) {
  constexpr int32_t kExponentMask = 0x7f800000;
  // Clearing sign and fraction of a float32 leaves the power of two below its magnitude.
  const auto powers = block.contiguous().view(at::kInt).bitwise_and(kExponentMask).view(at::kFloat);
  const auto norm = powers.clamp_min_(std::ldexp(1.0, format.min_exponent)).norm(2, at::kDouble).item<double>();
  return std::ldexp(norm * norm, -2 * format.fraction_bits);
}

double norm2(const Tensor& block) {
  const double norm = block.norm(2, at::kDouble).item<double>();
  return norm * norm;
}

}  // namespace

Displacement displacement(const Tensor& base, const Tensor& aligned, std::optional<double> noise_std) {
  check_matrix(base, "base");
  check_matrix(aligned, "aligned");
  check(base.sizes() == aligned.sizes(), "base is ", base.sizes(), " and aligned is ", aligned.sizes(),
        "; both checkpoints must have the same shape");
  check(!noise_std || (std::isfinite(*noise_std) && *noise_std >= 0), "noise_std must be finite and not negative");

  const int64_t rows = base.size(0);
  const int64_t columns = base.size(1);
  check(rows > 0 && columns > 0, "base and aligned are empty");
  Displacement result{at::empty({rows, columns}, at::kFloat)};
  double spacing2 = 0;
  const int64_t step = std::max<int64_t>(1, kRowBlockEntries / columns);
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    const auto base_block = base.narrow(0, row, count).to(at::kFloat);
    const auto block = result.matrix.narrow(0, row, count).copy_(aligned.narrow(0, row, count));
    if (!noise_std) {
      spacing2 += spacing_norm2(base_block, storage_format(base.scalar_type())) +
                  spacing_norm2(block, storage_format(aligned.scalar_type()));
    }
    block.sub_(base_block);
    result.norm2 += norm2(block);
  }
  check(std::isfinite(result.norm2), "base or aligned holds NaN, infinity or values too large");
  // Rounding to a grid of spacing h is uniform in [-h/2, h/2]: variance h^2 / 12.
  const double entries = static_cast<double>(rows) * static_cast<double>(columns);
  result.noise_std = noise_std.value_or(std::sqrt(spacing2 / 12 / entries));
  return result;
}

}  // namespace csulora
