#include <ATen/ATen.h>

#include <limits>
#include <utility>

#include "extract/convergence.h"
#include "extract/decomposition.h"
#include "linalg/orthonormal.h"
#include "linalg/products.h"

namespace csulora {
namespace {

using at::Tensor;

/// Where so many steps do not suffice, the start has missed something.
constexpr int kMaxSteps = 6;

/// Residuals are estimated with the copy that the start was found with, whose rounding they hardly see: they have to be
/// so much smaller.
constexpr double kEstimateShare = 0.9;

/// The singular triples of a matrix (m, n) that is projected onto orthonormal rows (b, m).
struct Projected {
  Tensor left;    // (b, m) float32, rows u
  Tensor right;   // (b, n) float32, rows v
  Tensor values;  // (b) float64, s, descending
};

/// @param image  (b, n) rows times the matrix
Projected project(const Tensor& rows, const Tensor& image) {
  const auto wide = image.to(at::kDouble);
  const auto [squares, vectors] = at::linalg_eigh(wide.matmul(wide.t()));
  const auto turn = vectors.flip(1).t().to(at::kFloat);
  const auto values = squares.flip(0).clamp_min_(0).sqrt_();
  const auto lengths = values.to(at::kFloat).clamp_min_(std::numeric_limits<float>::min()).unsqueeze(1);
  return {turn.mm(rows), turn.mm(image).div_(lengths), values};
}

/// `block` less its part in the span of orthonormal rows.
Tensor outside(const Tensor& block, const Tensor& rows) { return block.addmm(block.mm(rows.t()), rows, 1, -1); }

/// A v - s u of every triple, (b, m) float64, which is what A makes of v outside of all u; A^T u = s v holds by
/// construction.
///
/// @param known  orthonormal rows that A maps into the span of u, or undefined: of v only the rest counts. What is
///               rounded in the product is then a small share of something small.
Tensor residual_vectors(const Projected& found, const Tensor& low_precision, const Tensor& known) {
  auto product = at::empty_like(found.left);
  multiply(product, known.defined() ? outside(found.right, known) : found.right, low_precision.t());
  return outside(product, found.left).to(at::kDouble);
}

}  // namespace

std::optional<SingularTriples> refine(const Tensor& matrix, const Tensor& low_precision, const Tensor& start,
                                      const TargetCount& target_count, const Accuracy& accuracy) {
  auto a = matrix, low_precision_a = low_precision;  // and their transposes in every other step
  auto rows = start.contiguous();
  orthonormalise(rows);
  const Accuracy estimated{accuracy.residual * kEstimateShare, accuracy.energy};
  Tensor known;
  for (int i = 0; i < kMaxSteps; ++i) {
    const auto image = at::empty({rows.size(0), a.size(1)}, rows.options());
    multiply(image, rows, a);
    const auto found = project(rows, image);
    const RitzValues ritz(found.values, residual_vectors(found, low_precision_a, known));
    const int64_t count = target_count(ritz.values);
    if (count < rows.size(0) && shortfall(ritz, count, target_count, estimated) <= 1) {
      SingularTriples triples;
      triples.s = ritz.values.narrow(0, 0, count);
      triples.u = found.left.narrow(0, 0, count).t();
      triples.v = found.right.narrow(0, 0, count).t();
      if (i % 2 == 1) {
        std::swap(triples.u, triples.v);
      }
      triples.upper = upper_values(ritz, count);
      triples.largest_energy = largest_energy(ritz, count);
      triples.computed = ritz.values;
      triples.passes = 2 * (i + 1);
      return triples;
    }
    known = rows;
    rows = image;
    orthonormalise(rows);
    a = a.t();
    low_precision_a = low_precision_a.t();
  }
  return std::nullopt;
}

}  // namespace csulora
