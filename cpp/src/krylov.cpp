#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <limits>
#include <vector>

#include "check.h"
#include "decomposition.h"

namespace csulora {
namespace {

using at::Tensor;
using at::indexing::Slice;

/// How well the first unwanted Ritz value must have converged. A Ritz value errs by the square of its residual, so
/// this leaves well under a percent.
constexpr double kNextTolerance = 0.1;
/// What float32 products leave in a residual, as a share of the largest singular value.
constexpr double kRounding = 4 * std::numeric_limits<float>::epsilon();

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
    auto [directions, triangle] = at::linalg_qr(block);
    // QR divides rank-deficient columns by their norm, which is rounding: only a second sweep makes them orthogonal.
    remove(directions);
    auto [orthonormal, correction] = at::linalg_qr(directions);
    blocks_.push_back(orthonormal);
    return {above, correction.matmul(triangle)};
  }

  const Tensor& back() const { return blocks_.back(); }
  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }

  /// basis * coefficients for coefficients (columns, k).
  Tensor combine(const Tensor& coefficients) const {
    const int64_t width = blocks_.front().size(1);
    auto result = blocks_.front().matmul(coefficients.narrow(0, 0, width));
    for (int64_t i = 1; i < size(); ++i) {
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
    return coefficients.empty() ? at::empty({0, block.size(1)}, at::kFloat) : at::cat(coefficients, 0);
  }

  std::vector<Tensor> blocks_;
};

Tensor gaussian(int64_t rows, int64_t columns, uint64_t seed) {
  return at::randn({rows, columns}, at::detail::createCPUGenerator(seed), at::kFloat);
}

/// The matrix seen from both Krylov bases, and the residual of every Ritz triple.
struct Ritz {
  Tensor left;       // (j, j) float64, columns are coefficients of u in the left basis
  Tensor values;     // (j) float64
  Tensor right;      // (j, j) float64, columns are coefficients of v in the right basis
  Tensor residuals;  // (j) float64, |A^T u - s v| and rounding; A v = s u holds by construction
};

Ritz rayleigh_ritz(const Tensor& projected, const Tensor& residual_block) {
  const auto [left, values, right_t] = at::linalg_svd(projected.to(at::kDouble), false);
  const int64_t width = residual_block.size(0);
  const auto last = left.narrow(0, left.size(0) - width, width);  // (b, j)
  const auto residuals = residual_block.to(at::kDouble).matmul(last).norm(2, 0).add_(values[0], kRounding);
  return {left, values, right_t.t(), residuals};
}

/// Whether the leading `count` triples have converged, and the next value is known well enough to say that it is not
/// wanted and to measure the gap to it.
bool converged(const Ritz& ritz, int64_t count, double tolerance) {
  const auto relative = ritz.residuals.div(ritz.values.clamp_min(std::numeric_limits<double>::min()));
  return relative.narrow(0, 0, count).le(tolerance).all().item<bool>() &&
         relative[count].item<double>() <= kNextTolerance;
}

/// Adds the coefficients of one more block to the right of the projected matrix.
Tensor extend(const Tensor& projected, const BlockBasis::Coefficients& column) {
  const int64_t size = projected.defined() ? projected.size(0) : 0;
  const int64_t width = column.triangle.size(0);
  auto extended = at::zeros({size + width, size + width}, at::kFloat);
  if (size > 0) {
    extended.index_put_({Slice(0, size), Slice(0, size)}, projected);
    extended.index_put_({Slice(0, size), Slice(size)}, column.above);
  }
  extended.index_put_({Slice(size), Slice(size)}, column.triangle);
  return extended;
}

}  // namespace

std::optional<SingularTriples> block_krylov(const Tensor& matrix, const WantedCount& wanted,
                                            const KrylovOptions& options) {
  check_internal(options.block >= 1, "empty Krylov block");
  BlockBasis left;
  BlockBasis right;
  right.append(matrix.t().matmul(gaussian(matrix.size(0), options.block, options.seed)));
  Tensor projected;
  while (left.size() < options.max_blocks) {
    projected = extend(projected, left.append(matrix.matmul(right.back())));
    const auto residual_block = right.append(matrix.t().matmul(left.back())).triangle;
    const auto ritz = rayleigh_ritz(projected, residual_block);
    const int64_t count = wanted(ritz.values);
    if (!converged(ritz, count, options.tolerance)) {
      continue;
    }
    const auto coefficients = [&](const Tensor& columns) { return columns.narrow(1, 0, count).to(at::kFloat); };
    // The right basis is one block ahead of the projected matrix.
    const auto right_coefficients =
        at::cat({coefficients(ritz.right), at::zeros({options.block, count}, at::kFloat)}, 0);
    SingularTriples triples;
    triples.u = left.combine(coefficients(ritz.left));
    triples.s = ritz.values.narrow(0, 0, count);
    triples.v = right.combine(right_coefficients);
    triples.next_value = (ritz.values[count] + ritz.residuals[count]).item<double>();
    triples.computed = ritz.values;
    triples.passes = 2 * left.size() + 1;
    return triples;
  }
  return std::nullopt;
}

}  // namespace csulora
