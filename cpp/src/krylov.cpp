#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "check.h"
#include "decomposition.h"
#include "orthonormal.h"

namespace csulora {
namespace {

using at::Tensor;
using at::indexing::Slice;

/// How well the first unwanted Ritz value must have converged, as a share of it or of the gap to it. A Ritz value errs
/// by the square of its residual, so this leaves well under a percent.
constexpr double kNextTolerance = 0.1;
/// Blocks between two looks at the Ritz values, as a share of those there are: looking costs as much as adding them.
constexpr double kStride = 0.25;

/// Columns that a sweep shortens by less than this are orthogonal to what was removed: "twice is enough" (Parlett
/// 1998).
constexpr double kKeptLength = 0.5;
constexpr int kMaxSweeps = 4;

/// An orthonormal basis that grows by blocks of vectors, which are kept as rows.
class BlockBasis {
 public:
  /// @param capacity  the most vectors there will be; memory of the CPU is touched as they come
  BlockBasis(int64_t capacity, int64_t length, const at::TensorOptions& options)
      : vectors_(at::empty({capacity, length}, options)) {}

  /// What an appended block was made of: block = previous * above + appended * triangle, vectors as columns.
  struct Coefficients {
    Tensor above;     // (previous vectors, b)
    Tensor triangle;  // (b, b)
  };

  /// Orthonormalises the rows of factor (b, p) times matrix (p, length) against the basis and themselves and appends
  /// them.
  ///
  /// Of the basis, a block of the bidiagonalisation meets the last one alone; the rest is rounding, which the full
  /// sweep removes. Vectors that it shortens were mostly rounding and are swept again.
  Coefficients append(const Tensor& factor, const Tensor& matrix) {
    const int64_t before = size_;
    const int64_t width = factor.size(0);
    auto appended = vectors_.narrow(0, before, width);
    at::mm_out(appended, factor, matrix);
    auto above = at::zeros({width, before}, appended.options());  // rows, until the end
    const int64_t last = std::max<int64_t>(0, before - width);
    above.narrow(1, last, before - last).copy_(remove(appended, last, before));
    auto triangle = orthonormalise(appended);
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      above.addmm_(triangle, remove(appended, 0, before));
      const auto correction = orthonormalise(appended);
      triangle = triangle.matmul(correction);
      if (correction.diagonal().abs().min().item<double>() > kKeptLength) {
        break;
      }
    }
    size_ += width;
    last_width_ = width;
    return {above.t(), triangle.t()};
  }

  /// The block that was appended last, (b, length).
  Tensor back() const { return vectors_.narrow(0, size_ - last_width_, last_width_); }

  /// The leading vectors of the basis times coefficients (vectors, k), as columns (length, k).
  Tensor combine(const Tensor& coefficients) const {
    return vectors_.narrow(0, 0, coefficients.size(0)).t().matmul(coefficients);
  }

 private:
  /// Subtracts from the rows of `block` their part in the vectors [first, end); returns that part's coefficients.
  Tensor remove(const Tensor& block, int64_t first, int64_t end) const {
    const auto previous = vectors_.narrow(0, first, end - first);
    const auto coefficients = block.matmul(previous.t());
    block.addmm_(coefficients, previous, 1, -1);
    return coefficients;
  }

  Tensor vectors_;  // (capacity, length)
  int64_t size_ = 0;
  int64_t last_width_ = 0;
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

Tensor gaussian(int64_t rows, int64_t columns, uint64_t seed, const at::TensorOptions& options) {
  return at::randn({rows, columns}, seeded(seed, options.device()), options);
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

/// How far the first unwanted value may still be off. A tenth of the gap to it serves as well as a tenth of itself
/// where how many are wanted does not hinge on it.
double allowed_of_next(const Ritz& ritz, int64_t count, const WantedCount& wanted) {
  const double next = ritz.values[count].item<double>();
  double scale = next;
  if (count > 0 && wanted(ritz.values + ritz.residuals) == count) {
    scale = std::max(scale, ritz.values[count - 1].item<double>() - next);
  }
  return std::max(kNextTolerance * scale, 2 * kResolution * ritz.values[0].item<double>());
}

/// Whether the leading `count` triples have converged, and the next value is known well enough, or is as good as zero,
/// to say that it is not wanted and to measure the gap to it.
bool converged(const Ritz& ritz, int64_t count, const WantedCount& wanted, double tolerance) {
  const auto& [values, left, residuals] = ritz;
  return residuals[count].item<double>() <= allowed_of_next(ritz, count, wanted) &&
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
  return triples;
}

}  // namespace

std::optional<SingularTriples> block_krylov(const Tensor& matrix, const WantedCount& wanted,
                                            const KrylovOptions& options) {
  check_internal(options.block >= 1, "empty Krylov block");
  BlockBasis left(options.max_blocks * options.block, matrix.size(0), matrix.options());
  BlockBasis right((options.max_blocks + 1) * options.block, matrix.size(1), matrix.options());
  right.append(gaussian(matrix.size(0), options.block, options.seed, matrix.options()).t(), matrix);
  Tensor projected;
  int64_t next_look = 1;
  for (int64_t blocks = 1; blocks <= options.max_blocks; ++blocks) {
    projected = extend(projected, left.append(right.back(), matrix.t()));
    const auto residual_block = right.append(left.back(), matrix).triangle;
    if (blocks < std::min(next_look, options.max_blocks)) {
      continue;
    }
    next_look = blocks + std::max<int64_t>(1, std::llround(kStride * static_cast<double>(blocks)));
    const auto ritz = rayleigh_ritz(projected, residual_block);
    const int64_t count = wanted(ritz.values);
    if (converged(ritz, count, wanted, options.tolerance)) {
      auto triples = leading(ritz, count, left, right, projected);
      triples.passes = 2 * blocks + 1;
      return triples;
    }
  }
  return std::nullopt;
}

}  // namespace csulora
