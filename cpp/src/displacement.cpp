#include "displacement.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "row_blocks.h"
#include "workers.h"

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

/// Leaves in `block` (float32) the spacing between neighbouring storable numbers around each entry.
void to_spacings(Tensor& block, StorageFormat format) {
  constexpr int32_t kExponentMask = 0x7f800000;
  // Clearing sign and fraction of a float32 leaves the power of two below its magnitude.
  block.view(at::kInt).bitwise_and_(kExponentMask);
  block.clamp_min_(std::ldexp(1.0, format.min_exponent)).mul_(std::ldexp(1.0, -format.fraction_bits));
}

/// Sums over some rows of D and of the squared spacings h^2 + h'^2 of both matrices, float64.
struct Sums {
  double norm2 = 0;
  Tensor row_spacings2;     // (rows)
  Tensor column_spacings2;  // (columns)
};

/// Writes rows of D, and sums them.
class Subtraction {
 public:
  Subtraction(const Tensor& base, const Tensor& aligned, const Tensor& result, bool with_spacings)
      : base_(base), aligned_(aligned), result_(result), with_spacings_(with_spacings) {}

  Sums rows(int64_t first, int64_t count) const {
    const int64_t columns = result_.size(1);
    Sums sums{0, at::zeros({count}, at::kDouble), at::zeros({columns}, at::kDouble)};
    const int64_t step = std::max<int64_t>(1, kCacheEntries / columns);
    for (int64_t row = 0; row < count; row += step) {
      some_rows(first + row, std::min(step, count - row),
                sums.row_spacings2.narrow(0, row, std::min(step, count - row)), sums);
    }
    return sums;
  }

 private:
  /// Entries that stay in a core's cache from one operation to the next.
  static constexpr int64_t kCacheEntries = int64_t{1} << 15;

  void some_rows(int64_t row, int64_t count, const Tensor& row_spacings2, Sums& sums) const {
    const auto block = result_.narrow(0, row, count).copy_(aligned_.narrow(0, row, count));
    auto base = at::empty_like(block).copy_(base_.narrow(0, row, count));
    auto aligned = with_spacings_ ? block.clone() : Tensor();
    block.sub_(base);
    const auto wide = block.to(at::kDouble).view(-1);
    sums.norm2 += wide.dot(wide).item<double>();
    if (with_spacings_) {
      to_spacings(base, storage_format(base_.scalar_type()));
      to_spacings(aligned, storage_format(aligned_.scalar_type()));
      // Both are powers of two. Relative to the largest, whose square is not lost, float32 holds their squares.
      const double largest = std::max(base.max().item<double>(), aligned.max().item<double>());
      const auto squares = base.div_(largest).square_().add_(aligned.div_(largest).square_());
      row_spacings2.add_(squares.sum(1), largest * largest);
      sums.column_spacings2.add_(squares.sum(0), largest * largest);
    }
  }

  const Tensor& base_;
  const Tensor& aligned_;
  const Tensor& result_;
  bool with_spacings_;
};

Displacement displacement_on_cpu(const Tensor& base, const Tensor& aligned, bool measure_noise) {
  const int64_t rows = base.size(0);
  const int64_t columns = base.size(1);
  Displacement result{at::empty({rows, columns}, at::kFloat)};
  const Subtraction subtraction(base, aligned, result.matrix, measure_noise);
  const int64_t step = rows_per_block(columns);
  std::vector<Sums> parts((rows + step - 1) / step);
  for_each_in_parallel(parts.size(), [&](size_t i) {
    const c10::NoGradGuard no_grad;
    const int64_t row = static_cast<int64_t>(i) * step;
    parts[i] = subtraction.rows(row, std::min(step, rows - row));
  });
  std::vector<Tensor> row_spacings2;
  auto column_spacings2 = at::zeros({columns}, at::kDouble);
  for (const auto& part : parts) {
    result.norm2 += part.norm2;
    row_spacings2.push_back(part.row_spacings2);
    column_spacings2.add_(part.column_spacings2);
  }
  result.noise_edge = rounding_edge(at::cat(row_spacings2).max().item<double>(), column_spacings2.max().item<double>());
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
