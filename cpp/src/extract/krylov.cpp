#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "extract/convergence.h"
#include "extract/decomposition.h"
#include "linalg/orthonormal.h"
#include "linalg/products.h"
#include "runtime/check.h"

namespace csulora {
namespace {

using at::Tensor;
using at::indexing::Slice;

/// Blocks between two looks at the Ritz values, as a share of those there are: looking costs as much as adding them.
constexpr double kStride = 0.2;

/// Columns that a sweep shortens by less than this are orthogonal to what was removed: "twice is enough" (Parlett
/// 1998).
constexpr double kKeptLength = 0.5;
constexpr int kMaxSweeps = 4;

/// An orthonormal basis that grows by blocks of vectors, which are kept as rows.
class BlockBasis {
 public:
  /// @param capacity  the most vectors there will be; memory of the CPU is touched as they come
  /// @param once      sweep once, where products err by far more than what that leaves
  BlockBasis(int64_t capacity, int64_t length, const at::TensorOptions& options, bool once)
      : vectors_(at::empty({capacity, length}, options.dtype(at::kFloat))), once_(once) {}

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
    multiply(appended, factor, matrix);
    auto above = at::zeros({width, before}, appended.options());  // rows, until the end
    const int64_t first = once_ ? 0 : std::max<int64_t>(0, before - width);
    above.narrow(1, first, before - first).copy_(remove(appended, first, before));
    auto triangle = orthonormalise(appended);
    bool kept = once_;
    for (int sweep = 0; !kept && sweep < kMaxSweeps; ++sweep) {
      above.addmm_(triangle, remove(appended, 0, before));
      const auto correction = orthonormalise(appended);
      triangle = triangle.matmul(correction);
      kept = correction.diagonal().abs().min().item<double>() > kKeptLength;
    }
    orthogonal_ = orthogonal_ && kept;
    size_ += width;
    last_width_ = width;
    return {above.t(), triangle.t()};
  }

  /// Whether all blocks came out orthogonal. One that is zeros but for what is there already is filled up with vectors
  /// of which sweeps leave nothing.
  bool is_orthogonal() const { return orthogonal_; }

  /// The block that was appended last, (b, length).
  Tensor back() const { return vectors_.narrow(0, size_ - last_width_, last_width_); }

  /// The leading vectors of the basis times coefficients (vectors, k), as columns (length, k).
  Tensor combine(const Tensor& coefficients) const {
    return product(coefficients.t(), vectors_.narrow(0, 0, coefficients.size(0))).t();
  }

 private:
  /// Subtracts from the rows of `block` their part in the vectors [first, end); returns that part's coefficients.
  Tensor remove(const Tensor& block, int64_t first, int64_t end) const {
    const auto previous = vectors_.narrow(0, first, end - first);
    // BLAS takes twice as long for block times previous^T, whose factors are both long in the terms of the sums.
    const auto coefficients = product(previous, block.t().contiguous()).t();
    add_product(block, coefficients, previous, -1);
    return coefficients;
  }

  Tensor vectors_;  // (capacity, length)
  bool once_;
  bool orthogonal_ = true;
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

/// The matrix seen from both Krylov bases.
struct Ritz {
  Tensor left;       // (j, j) float64, columns are coefficients of u in the left basis
  RitzValues found;  // (j), with A^T u - s v; A v = s u holds by construction
};

Ritz rayleigh_ritz(const Tensor& projected, const Tensor& residual_block) {
  const auto wide = projected.to(at::kDouble);
  const auto [squares, vectors] = at::linalg_eigh(wide.matmul(wide.t()));
  const auto values = squares.flip(0).clamp_min_(0).sqrt_();
  const auto left = vectors.flip(1);
  const int64_t width = residual_block.size(0);
  const auto last = left.narrow(0, left.size(0) - width, width);  // (b, j)
  return {left, {values, last.t().mm(residual_block.t().to(at::kDouble))}};
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

/// A Krylov space that holds the target triples.
struct Krylov {
  BlockBasis left, right;
  Tensor projected;
  Ritz ritz;
  int64_t passes = 0;
};

/// @param matrix  float32, or the bfloat16 copy of such a matrix
/// @return nothing if max_blocks or the digits did not suffice
std::optional<Krylov> bidiagonalise(const Tensor& matrix, const TargetCount& target_count,
                                    const KrylovOptions& options) {
  check_internal(options.block >= 1, "empty Krylov block");
  const bool low_precision = matrix.scalar_type() != at::kFloat;
  BlockBasis left(options.max_blocks * options.block, matrix.size(0), matrix.options(), low_precision);
  BlockBasis right((options.max_blocks + 1) * options.block, matrix.size(1), matrix.options(), low_precision);
  const auto start = gaussian(matrix.size(0), options.block, options.seed, matrix.options().dtype(at::kFloat));
  right.append(start.t(), matrix);
  Tensor projected;
  int64_t next_look = 1;
  for (int64_t blocks = 1; blocks <= options.max_blocks && right.is_orthogonal(); ++blocks) {
    projected = extend(projected, left.append(right.back(), matrix.t()));
    if (!left.is_orthogonal()) {
      break;
    }
    const auto residual_block = right.append(left.back(), matrix).triangle;
    if (blocks < std::min(next_look, options.max_blocks)) {
      continue;
    }
    next_look = blocks + std::max<int64_t>(1, std::llround(kStride * static_cast<double>(blocks)));
    auto ritz = rayleigh_ritz(projected, residual_block);
    if (accepted(ritz.found, target_count(ritz.found.values), target_count, options.accuracy)) {
      return Krylov{std::move(left), std::move(right), projected, std::move(ritz), 2 * blocks + 1};
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<SingularTriples> block_krylov(const Tensor& matrix, const TargetCount& target_count,
                                            const KrylovOptions& options) {
  const auto krylov = bidiagonalise(matrix, target_count, options);
  if (!krylov) {
    return std::nullopt;
  }
  const auto& values = krylov->ritz.found.values;
  const int64_t count = target_count(values);
  const auto coefficients = krylov->ritz.left.narrow(1, 0, count);
  SingularTriples triples;
  triples.s = values.narrow(0, 0, count);
  triples.u = krylov->left.combine(coefficients.to(at::kFloat));
  triples.v =
      krylov->right.combine(krylov->projected.t().to(at::kDouble).matmul(coefficients).div_(triples.s).to(at::kFloat));
  triples.upper = upper_values(krylov->ritz.found, count);
  triples.largest_energy = largest_energy(krylov->ritz.found, count);
  triples.computed = values;
  triples.passes = krylov->passes;
  return triples;
}

std::optional<SingularTriples> low_precision_block_krylov(const Tensor& matrix, const Tensor& low_precision,
                                                          const TargetCount& target_count,
                                                          const KrylovOptions& options) {
  const auto krylov = bidiagonalise(low_precision, target_count, options);
  if (!krylov) {
    return std::nullopt;
  }
  const auto start = krylov->left.combine(krylov->ritz.left.narrow(1, 0, options.block).to(at::kFloat));
  auto triples = refine(matrix, low_precision, start.t(), target_count, options.accuracy);
  if (triples) {
    triples->passes += krylov->passes;
  }
  return triples;
}

}  // namespace csulora
