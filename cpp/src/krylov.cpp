#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "check.h"
#include "decomposition.h"
#include "orthonormal.h"

namespace csulora {
namespace {

using at::Tensor;
using at::indexing::Slice;

/// How well the first unwanted Ritz value must have converged. A Ritz value errs by the square of its residual, so
/// this leaves well under a percent.
constexpr double kNextTolerance = 0.1;
/// Blocks between two looks at the Ritz values, as a share of those there are: looking costs as much as adding them.
constexpr double kStride = 0.25;

/// An orthonormal basis that grows by blocks of columns.
class BlockBasis {
 public:
  /// Orthonormalises `block` (rows, b) against the basis and itself and appends it.
  /// @return the coefficients: block = previous * above + appended * triangle
  struct Coefficients {
    Tensor above;     // (previous columns, b)
    Tensor triangle;  // (b, b)
  };
  Coefficients append(Tensor block) {
    const auto above = remove(block);
    auto [directions, triangle] = orthonormal_columns(block);
    // QR divides rank-deficient columns by their norm, which is rounding: only a second sweep makes them orthogonal.
    remove(directions);
    auto [orthonormal, correction] = orthonormal_columns(directions);
    blocks_.push_back(orthonormal);
    return {above, correction.matmul(triangle)};
  }

  const Tensor& back() const { return blocks_.back(); }
  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }

  /// The leading columns of the basis times coefficients (columns, k).
  Tensor combine(const Tensor& coefficients) const {
    const int64_t width = blocks_.front().size(1);
    auto result = blocks_.front().matmul(coefficients.narrow(0, 0, width));
    for (int64_t i = 1; i < coefficients.size(0) / width; ++i) {
      result.addmm_(blocks_[i], coefficients.narrow(0, i * width, width));
    }
    return result;
  }

 private:
  /// Subtracts from `block` its part in the basis; returns the coefficients of that part.
  Tensor remove(Tensor& block) const {
    std::vector<Tensor> coefficients;
    for (const auto& previous : blocks_) {
      coefficients.push_back(previous.t().matmul(block));
      block.addmm_(previous, coefficients.back(), 1, -1);
    }
    return coefficients.empty() ? at::empty({0, block.size(1)}, block.options()) : at::cat(coefficients, 0);
  }

  std::vector<Tensor> blocks_;
};

/// A generator of one's own. On a GPU a copy of torch's, since making one takes headers that only a CUDA build has.
at::Generator seeded(uint64_t seed, const at::Device& device) {
  if (device.is_cpu()) {
    return at::detail::createCPUGenerator(seed);
  }
  auto shared = at::globalContext().defaultGenerator(device);
  const std::lock_guard lock(shared.mutex());
  auto own = shared.clone();
  own.set_current_seed(seed);
  return own;
}

Tensor gaussian(int64_t rows, int64_t columns, uint64_t seed, const at::Device& device) {
  return at::randn({rows, columns}, seeded(seed, device), at::TensorOptions(device).dtype(at::kFloat));
}

/// The matrix seen from both Krylov bases, and the residual of every Ritz triple.
struct Ritz {
  Tensor values;     // (j) float64, descending
  Tensor left;       // (j, j) float64, columns are coefficients of u in the left basis
  Tensor residuals;  // (j) float64, |A^T u - s v| and rounding; A v = s u holds by construction
};

Ritz rayleigh_ritz(const Tensor& projected, const Tensor& residual_block) {
  const auto wide = projected.to(at::kDouble);
  const auto [squares, vectors] = at::linalg_eigh(wide.matmul(wide.t()));
  const auto values = squares.flip(0).clamp_min_(0).sqrt_();
  const auto left = vectors.flip(1);
  const int64_t width = residual_block.size(0);
  const auto last = left.narrow(0, left.size(0) - width, width);  // (b, j)
  const auto residuals = residual_block.to(at::kDouble).matmul(last).norm(2, 0).add_(values[0], kResolution);
  return {values, left, residuals};
}

/// Whether the leading `count` triples have converged, and the next value is known well enough, or is as good as zero,
/// to say that it is not wanted and to measure the gap to it.
bool converged(const Ritz& ritz, int64_t count, double tolerance) {
  const auto& [values, left, residuals] = ritz;
  const double next_residual = residuals[count].item<double>();
  const double next_allowed = std::max(kNextTolerance * values[count].item<double>(),  //
                                       2 * kResolution * values[0].item<double>());
  return next_residual <= next_allowed &&
         residuals.narrow(0, 0, count).le(values.narrow(0, 0, count) * tolerance).all().item<bool>();
}

/// Adds the coefficients of one more block to the right of the projected matrix.
Tensor extend(const Tensor& projected, const BlockBasis::Coefficients& column) {
  const int64_t size = projected.defined() ? projected.size(0) : 0;
  const int64_t width = column.triangle.size(0);
  auto extended = at::zeros({size + width, size + width}, column.triangle.options());
  if (size > 0) {
    extended.index_put_({Slice(0, size), Slice(0, size)}, projected);
    extended.index_put_({Slice(0, size), Slice(size)}, column.above);
  }
  extended.index_put_({Slice(size), Slice(size)}, column.triangle);
  return extended;
}

SingularTriples leading(const Ritz& ritz, int64_t count, const BlockBasis& left, const BlockBasis& right,
                        const Tensor& projected) {
  SingularTriples triples;
  triples.s = ritz.values.narrow(0, 0, count);
  const auto coefficients = ritz.left.narrow(1, 0, count);
  triples.u = left.combine(coefficients.to(at::kFloat));
  triples.v = right.combine(projected.t().to(at::kDouble).matmul(coefficients).div_(triples.s).to(at::kFloat));
  triples.next_value = (ritz.values[count] + ritz.residuals[count]).item<double>();
  triples.computed = ritz.values;
  triples.passes = 2 * left.size() + 1;
  return triples;
}

}  // namespace

std::optional<SingularTriples> block_krylov(const Tensor& matrix, const WantedCount& wanted,
                                            const KrylovOptions& options) {
  check_internal(options.block >= 1, "empty Krylov block");
  BlockBasis left;
  BlockBasis right;
  right.append(matrix.t().matmul(gaussian(matrix.size(0), options.block, options.seed, matrix.device())));
  Tensor projected;
  for (int64_t next_look = 1; left.size() < options.max_blocks;) {
    projected = extend(projected, left.append(matrix.matmul(right.back())));
    const auto residual_block = right.append(matrix.t().matmul(left.back())).triangle;
    if (left.size() < std::min(next_look, options.max_blocks)) {
      continue;
    }
    next_look = left.size() + std::max<int64_t>(1, std::llround(kStride * static_cast<double>(left.size())));
    const auto ritz = rayleigh_ritz(projected, residual_block);
    const int64_t count = wanted(ritz.values);
    if (converged(ritz, count, options.tolerance)) {
      return leading(ritz, count, left, right, projected);
    }
  }
  return std::nullopt;
}

}  // namespace csulora
