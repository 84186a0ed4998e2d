#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
/// There are at most twice as many, as convergence may speed up.
constexpr double kStride = 0.2;

/// Columns that a sweep shortens by less than this are orthogonal to what was removed: "twice is enough" (Parlett
/// 1998).
constexpr double kKeptLength = 0.5;
constexpr int kMaxSweeps = 4;

/// Where products err far more than float32, one sweep does for columns that keep so much of their length: what is left
/// of the others in them is a few roundings divided by that.
constexpr double kSureLength = 1e-3;

/// Vectors beyond the targets that a refinement starts with: where few of a block are targets, the others are not worth
/// their products.
constexpr int64_t kRefinedBeyond = 16;

/// An orthonormal basis that grows by blocks of vectors, which are kept as rows.
class BlockBasis {
 public:
  /// @param capacity  the most vectors there will be; memory of the CPU is touched as they come
  /// @param once      sweep once where that is sure to do: products err by far more than what it leaves
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
    bool kept = once_ && triangle.diagonal().abs().min().item<double>() >
                             kSureLength * std::max(largest_entry(above), largest_entry(triangle));
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
  static double largest_entry(const Tensor& matrix) {
    return matrix.numel() > 0 ? matrix.abs().max().item<double>() : 0;
  }

  /// Subtracts from the rows of `block` their part in the vectors [first, end); returns that part's coefficients.
  Tensor remove(const Tensor& block, int64_t first, int64_t end) const {
    const auto previous = vectors_.narrow(0, first, end - first);
    const auto coefficients = inner_products(previous, block).t();
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

/// The products with A A^T of a basis of Krylov vectors, seen from that basis.
struct Squares {
  Tensor projected;       // (j, j) float32, block tridiagonal, of which the lower triangle counts
  Tensor residual_block;  // (b, b), what the last block's products have outside of the basis, in the next block
  double scale = 0;       // of both: A A^T / scale
};

/// Adds the products of one more block. Of what they have in the blocks before, nothing is read: the last one's share
/// is known from its own products, and the others' is rounding, which would couple what has converged to what has not.
void extend(Squares& squares, const BlockBasis::Coefficients& column) {
  const int64_t width = column.triangle.size(0), size = column.above.size(0), before = size - width;
  const auto own = column.above.narrow(0, before, width);
  auto extended = at::zeros({size, size}, own.options());
  extended.narrow(0, before, width).narrow(1, before, width).copy_(own.add(own.t()).div_(2));
  if (before > 0) {
    extended.narrow(0, 0, before).narrow(1, 0, before).copy_(squares.projected);
    extended.narrow(0, before, width).narrow(1, before - width, width).copy_(squares.residual_block);
  }
  squares.projected = extended;
  squares.residual_block = column.triangle;
}

Ritz rayleigh_ritz(const Squares& squares) {
  // Its entries have no more digits, and float64 takes half as long again.
  const auto [scaled, vectors] = at::linalg_eigh(squares.projected);
  const auto values = scaled.flip(0).to(at::kDouble).clamp_min_(0).mul_(squares.scale).sqrt_();
  const auto left = vectors.flip(1).to(at::kDouble);
  const int64_t width = squares.residual_block.size(0);
  const auto last = left.narrow(0, left.size(0) - width, width);  // (b, j)
  const auto residuals = last.t().mm(squares.residual_block.t().to(at::kDouble)).mul_(squares.scale);
  const auto lengths = values.clamp_min(kResolution * values[0].item<double>()).unsqueeze(1);
  return {left, {values, residuals.div_(lengths)}};
}

/// After how many blocks to look at the Ritz values.
class Looks {
 public:
  Looks(int64_t first, int64_t max_blocks) : max_blocks_(max_blocks), next_(first) {}

  bool is_due(int64_t blocks) const { return blocks >= std::min(next_, max_blocks_); }

  /// Places the next look before the shortfall, above 1, would be made up for at the rate it fell at since the last.
  void fell_short(int64_t blocks, double shortfall) {
    const auto stride = std::max<double>(1, std::round(kStride * static_cast<double>(blocks)));
    const double fall = std::log(shortfall_ / shortfall) / static_cast<double>(blocks - blocks_);
    const double ahead = fall > 0 ? std::clamp(std::log(shortfall) / fall, stride, 2 * stride) : 2 * stride;
    next_ = blocks + static_cast<int64_t>(ahead);
    blocks_ = blocks;
    shortfall_ = shortfall;
  }

 private:
  int64_t max_blocks_;
  int64_t next_;
  int64_t blocks_ = 0;  // at the last look, as is:
  double shortfall_ = std::numeric_limits<double>::infinity();
};

/// A Krylov space that holds the target triples.
struct Krylov {
  BlockBasis left, right;
  Tensor projected;
  Ritz ritz;
  int64_t passes = 0;
};

/// @param matrix  float32
/// @return nothing if max_blocks or the digits did not suffice
std::optional<Krylov> bidiagonalise(const Tensor& matrix, const TargetCount& target_count,
                                    const KrylovOptions& options) {
  check_internal(options.block >= 1, "empty Krylov block");
  BlockBasis left(options.max_blocks * options.block, matrix.size(0), matrix.options(), /*once=*/false);
  BlockBasis right((options.max_blocks + 1) * options.block, matrix.size(1), matrix.options(), /*once=*/false);
  const auto start = gaussian(matrix.size(0), options.block, options.seed, matrix.options());
  right.append(start.t(), matrix);
  Tensor projected;
  Looks looks(options.most_targets / options.block + 1, options.max_blocks);
  for (int64_t blocks = 1; blocks <= options.max_blocks && right.is_orthogonal(); ++blocks) {
    projected = extend(projected, left.append(right.back(), matrix.t()));
    if (!left.is_orthogonal()) {
      break;
    }
    const auto residual_block = right.append(left.back(), matrix).triangle;
    if (!looks.is_due(blocks)) {
      continue;
    }
    auto ritz = rayleigh_ritz(projected, residual_block);
    const double missing = shortfall(ritz.found, target_count(ritz.found.values), target_count, options.accuracy);
    if (missing <= 1) {
      return Krylov{std::move(left), std::move(right), projected, std::move(ritz), 2 * blocks + 1};
    }
    looks.fell_short(blocks, missing);
  }
  return std::nullopt;
}

/// Vectors that all but span the leading left ones.
struct Start {
  Tensor rows;  // (c, m) float32, c <= b
  int64_t passes = 0;
};

/// Block Lanczos with A A^T (Golub & Underwood 1977). There are half as many vectors to orthogonalise as in a
/// bidiagonalisation, and short ones. What squaring costs in digits, bfloat16 entries do not have.
///
/// @param matrix  (m, n) bfloat16
/// @return nothing if max_blocks or the digits did not suffice
std::optional<Start> lanczos(const Tensor& matrix, const TargetCount& target_count, const KrylovOptions& options) {
  const auto floats = matrix.options().dtype(at::kFloat);
  BlockBasis basis((options.max_blocks + 1) * options.block, matrix.size(0), floats, /*once=*/true);
  const auto image = at::empty({options.block, matrix.size(1)}, floats);
  multiply(image, gaussian(options.block, matrix.size(0), options.seed, floats), matrix);
  Squares squares{{}, {}, image.norm().item<double>()};
  if (squares.scale == 0) {
    return std::nullopt;
  }
  basis.append(image.div_(squares.scale), matrix.t());
  Looks looks(options.most_targets / options.block + 1, options.max_blocks);
  for (int64_t blocks = 1; blocks <= options.max_blocks && basis.is_orthogonal(); ++blocks) {
    multiply(image, basis.back() / squares.scale, matrix);
    extend(squares, basis.append(image, matrix.t()));
    if (!looks.is_due(blocks)) {
      continue;
    }
    const auto ritz = rayleigh_ritz(squares);
    const int64_t count = target_count(ritz.found.values);
    const double missing = shortfall(ritz.found, count, target_count, options.accuracy);
    if (missing <= 1) {
      const int64_t refined = std::min(ritz.left.size(1), count + kRefinedBeyond);
      const auto leading = ritz.left.narrow(1, 0, refined).to(at::kFloat);
      return Start{basis.combine(leading).t(), 2 * blocks + 2};
    }
    looks.fell_short(blocks, missing);
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
  const bool is_wide = matrix.size(0) <= matrix.size(1);
  const auto a = is_wide ? low_precision : low_precision.t();
  const auto start = lanczos(a, target_count, options);
  if (!start) {
    return std::nullopt;
  }
  // Half a step beyond what was accepted, so that the rounding of what follows costs no second one.
  const auto rows = at::empty({start->rows.size(0), a.size(1)}, start->rows.options());
  multiply(rows, start->rows, a);
  auto triples = is_wide ? refine(matrix.t(), low_precision.t(), rows, target_count, options.accuracy)
                         : refine(matrix, low_precision, rows, target_count, options.accuracy);
  if (triples) {
    triples->passes += start->passes + 1;
    if (is_wide) {
      std::swap(triples->u, triples->v);
    }
  }
  return triples;
}

}  // namespace csulora
