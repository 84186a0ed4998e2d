#include "displacement.h"

#include <ATen/ATen.h>

#include <cmath>

#include "check.h"
#include "row_blocks.h"

namespace csulora {
namespace {

using at::Tensor;

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

/// The spacing between neighbouring storable numbers around each entry, float32.
Tensor spacing(const Tensor& block, StorageFormat format) {
  constexpr int32_t kExponentMask = 0x7f800000;
  // Clearing sign and fraction of a float32 leaves the power of two below its magnitude.
  const auto powers = block.contiguous().view(at::kInt).bitwise_and(kExponentMask).view(at::kFloat);
  return powers.clamp_min_(std::ldexp(1.0, format.min_exponent)).mul_(std::ldexp(1.0, -format.fraction_bits));
}

/// Squared norms along one dimension, float64.
Tensor norms2(const Tensor& block, int64_t dim) { return block.norm(2, {dim}, false, at::kDouble).square_(); }

/// The squared spacings of both matrices, summed along rows and columns, and what rounding to them can amount to.
class RoundingNoise {
 public:
  RoundingNoise(int64_t rows, int64_t columns)
      : rows_(at::zeros({rows}, at::kDouble)), columns_(at::zeros({columns}, at::kDouble)) {}

  void add(int64_t row, const Tensor& block, at::ScalarType dtype) {
    const auto spacings = spacing(block, storage_format(dtype));
    rows_.narrow(0, row, block.size(0)).add_(norms2(spacings, 1));
    columns_.add_(norms2(spacings, 0));
  }

  double edge() const { return rounding_edge(rows_.max().item<double>(), columns_.max().item<double>()); }

 private:
  Tensor rows_;
  Tensor columns_;
};

Displacement displacement_on_cpu(const Tensor& base, const Tensor& aligned, bool measure_noise) {
  const int64_t rows = base.size(0);
  const int64_t columns = base.size(1);
  Displacement result{at::empty({rows, columns}, at::kFloat)};
  RoundingNoise noise(rows, columns);
  for_row_blocks(rows, columns, [&](int64_t row, int64_t count) {
    const auto base_block = base.narrow(0, row, count).to(at::kFloat);
    const auto block = result.matrix.narrow(0, row, count).copy_(aligned.narrow(0, row, count));
    if (measure_noise) {
      noise.add(row, base_block, base.scalar_type());
      noise.add(row, block, aligned.scalar_type());
    }
    const double norm = block.sub_(base_block).norm(2, at::kDouble).item<double>();
    result.norm2 += norm * norm;
  });
  result.noise_edge = noise.edge();
  return result;
}

}  // namespace

Displacement displacement(const Tensor& base, const Tensor& aligned, std::optional<double> noise_std) {
  check_matrix(base, "base");
  check_matrix(aligned, "aligned");
  check_same_device(aligned, base, "aligned");
  check(base.sizes() == aligned.sizes(), "base is ", base.sizes(), " and aligned is ", aligned.sizes(),
        "; both checkpoints must have the same shape");
  check(!noise_std || (std::isfinite(*noise_std) && *noise_std >= 0), "noise_std must be finite and not negative");
  check(base.numel() > 0, "base and aligned are empty");

  auto result = base.is_cpu() ? displacement_on_cpu(base, aligned, !noise_std) : displacement_on_device(base, aligned);
  check(std::isfinite(result.norm2), "base or aligned holds NaN, infinity or values too large");
  if (noise_std) {
    result.noise_edge = *noise_std * (std::sqrt(base.size(0)) + std::sqrt(base.size(1)));
  }
  return result;
}

}  // namespace csulora
