#include "correct/half_precision.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "correct/gains.h"
#include "correct/gram_root.h"
#include "correct/gram_sides.h"
#include "correct/measurement.h"
#include "correct/result_rank.h"
#include "correct/storage.h"
#include "correct/strips.h"
#include "correct/truncation.h"
#include "correct/undo.h"
#include "linalg/conversion.h"
#include "linalg/tall_products.h"

namespace csulora {
namespace {

using at::Tensor;

/// What rounding to a storage type costs, relative to what is rounded.
double rounding_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 0x1p-11;
    case at::kBFloat16:
      return 0x1p-8;
    default:
      return kFloatRounding;
  }
}

/// By how much rounding bends a basis: errors of its entries are as often up as down.
double bend_of(at::ScalarType dtype) { return rounding_of(dtype) / 4; }

/// One factor F = scale * factor (m, r) and the basis (m, k) of its side.
struct Side {
  const Tensor& factor;
  double scale;
  const Tensor& basis;
};

/// Strips of rows of F and of the basis in float32, rows and columns padded by zeros.
class SideStrips {
 public:
  explicit SideStrips(const Side& side)
      : scale_(static_cast<float>(side.scale)),
        rows_(side.factor.size(0)),
        width_(tall::padded(side.factor.size(1), tall::kWidth)),
        // Strips of a basis that lies by columns are padded to kWidth, whatever was asked for.
        directions_(tall::padded(side.basis.size(1), side.basis.stride(1) == 1 ? tall::kRowStep : tall::kWidth)),
        factor_(side.factor, 0),
        basis_(side.basis, 0),
        strip_(kStripRows * (width_ + directions_)) {}

  int64_t width() const { return width_; }
  int64_t directions() const { return directions_; }

  /// Calls visit(row, count, [F, basis]) for strips of `count` rows that begin at a row, and are padded by rows of
  /// zeros. From the last to the first if asked, so that what was read last, and is in the cache, is read first.
  template <typename Visit>
  void for_each(Visit visit, bool backwards = false) {
    const int64_t columns = width_ + directions_, strips = (rows_ + kStripRows - 1) / kStripRows;
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t row = (backwards ? strips - 1 - i : i) * kStripRows;
      const int64_t count = std::min(kStripRows, rows_ - row), padded = tall::padded(count, tall::kRowStep);
      std::fill(strip_.begin() + count * columns, strip_.begin() + padded * columns, 0.0F);
      factor_.read(row, scale_, {strip_.data(), count, width_, columns});
      basis_.read(row, 1, {strip_.data() + width_, count, directions_, columns});
      if (i + 1 < strips) {
        const int64_t next = backwards ? row - kStripRows : row + kStripRows;
        factor_.prefetch(next);
        basis_.prefetch(next);
      }
      visit(row, count, contiguous_view<const float>(strip_.data(), padded, columns));
    }
  }

 private:
  float scale_;
  int64_t rows_;
  int64_t width_;
  int64_t directions_;
  Strips factor_;
  Strips basis_;
  std::vector<float> strip_;
};

/// The first rows and columns.
SmallMatrix corner(const SmallMatrix& matrix, int64_t first, int64_t rows, int64_t columns) {
  SmallMatrix result(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(matrix[first + i], columns, result[i]);
  }
  return result;
}

GramSide measured_side(const Side& side) {
  SideStrips strips(side);
  SmallMatrix products(strips.width() + strips.directions(), strips.width());  // [F, basis]^T F
  const auto sums = contiguous_view(products[0], products.rows(), products.columns());
  strips.for_each([&](int64_t, int64_t, MatrixView<const float> strip) {
    tall::project(strip, {strip.data, strip.rows, strips.width(), strip.stride}, sums);
  });
  const int64_t r = side.factor.size(1);
  GramSide result{corner(products, strips.width(), side.basis.size(1), r), corner(products, 0, r, r)};
  const auto inside = product(transposed(result.coordinates), result.coordinates);
  std::transform(result.outside[0], result.outside[r], inside[0], result.outside[0], std::minus<double>());
  return result;
}

/// The Gram matrix (2r, 2r) of the columns [inside, outside], as halves that are orthogonal.
SmallMatrix gram_of_halves(const GramSide& side) {
  const int64_t r = side.outside.rows();
  const auto inside = product(transposed(side.coordinates), side.coordinates);
  SmallMatrix result(2 * r, 2 * r);
  for (int64_t i = 0; i < r; ++i) {
    std::copy_n(inside[i], r, result[i]);
    std::copy_n(side.outside[i], r, result[r + i] + r);
  }
  return result;
}

/// [F, basis] weights = [inside, outside] mixture for a mixture (2r, j), padded by zeros as strips are.
class Weights {
 public:
  Weights(const GramSide& side, const SmallMatrix& mixture, const SideStrips& strips)
      : rows_(strips.width() + strips.directions()),
        columns_(tall::padded(mixture.columns(), tall::kWidth)),
        entries_(rows_ * columns_) {
    const int64_t r = side.outside.rows();
    auto difference = corner(mixture, 0, r, mixture.columns());
    std::transform(difference[0], difference[r], mixture[r], difference[0], std::minus<double>());
    const auto of_directions = product(side.coordinates, difference);
    write(corner(mixture, r, r, mixture.columns()), 0);
    write(of_directions, strips.width());
  }

  MatrixView<const float> view() const { return contiguous_view(entries_.data(), rows_, columns_); }

 private:
  void write(const SmallMatrix& matrix, int64_t row) {
    for (int64_t i = 0; i < matrix.rows(); ++i) {
      std::copy_n(matrix[i], matrix.columns(), entries_.begin() + (row + i) * columns_);
    }
  }

  int64_t rows_;
  int64_t columns_;
  std::vector<float> entries_;
};

/// [inside, outside] mixture, (m, j), or its transpose if asked, in the factor's own type.
Tensor combined(const Side& side, const GramSide& measured, const SmallMatrix& mixture, bool is_transposed,
                const std::string& label) {
  SideStrips strips(side);
  const Weights weights(measured, mixture, strips);
  const auto view = weights.view();
  const auto dtype = side.factor.scalar_type();
  const int64_t rows = side.factor.size(0), columns = mixture.columns();
  auto result = is_transposed ? at::empty({columns, rows}, side.factor.options())
                              : at::empty({rows, columns}, side.factor.options());
  auto* const bytes = static_cast<char*>(result.mutable_data_ptr());
  const int64_t row_bytes = result.stride(is_transposed ? 1 : 0) * static_cast<int64_t>(result.element_size());
  std::vector<float> product(kStripRows * view.columns);
  float largest = 0;
  strips.for_each(
      [&](int64_t row, int64_t count, MatrixView<const float> strip) {
        MatrixView<float> sums{product.data(), count, columns, view.columns};
        if (is_transposed) {
          sums = {product.data(), columns, count, kStripRows};
          tall::multiply_transposed(strip, view, {sums.data, view.columns, count, sums.stride});
        } else {
          tall::multiply(strip, view, {sums.data, strip.rows, view.columns, sums.stride});
        }
        const float most = narrow(sums, dtype, bytes + row * row_bytes, result.stride(0));
        largest = largest >= most ? largest : most;  // NaN, once there
      },
      /*backwards=*/true);
  check_stored(largest, dtype, label);
  return result;
}

bool is_stored_in_half(const CorrectionTask& task) {
  const auto& b = task.factors.b;
  return b.is_cpu() && (b.scalar_type() == at::kHalf || b.scalar_type() == at::kBFloat16) &&
         fits_float(task.factors.scale);
}

std::vector<double> errors2_of(const SmallMatrix& gram, double rounding) {
  std::vector<double> result(gram.rows() / 2);
  for (size_t i = 0; i < result.size(); ++i) {
    const auto column = static_cast<int64_t>(i);
    result[i] = rounding * rounding * gram[column][column];  // of what lies inside: outside is what that leaves
  }
  return result;
}

/// Whether what a side has outside its basis is known: its squares are numbers that float32 holds, and more than what a
/// bend of the basis makes of what lies inside. A column of zeros may be one of numbers whose squares are nothing.
bool knows_outside(const GramSide& side, double bend) {
  constexpr double kBends = 64, kLeast = 0x1p-96;
  const auto inside = product(transposed(side.coordinates), side.coordinates);
  bool is_known = true;
  for (int64_t i = 0; i < inside.rows(); ++i) {
    const double outside = side.outside[i][i];
    is_known = is_known && std::isfinite(outside) && outside >= std::max(kLeast, kBends * bend * inside[i][i]);
  }
  return is_known;
}

/// Whether the bends of the bases cost less than rounding X does, and no column of a is all but in the span of others.
bool is_good_enough(const CorrectionTask& task, const SmallMatrix& b_gram, const GramSide& a, const SmallMatrix& a_gram,
                    const Correction& result) {
  constexpr double kIndependent = 0.1;
  const double bend = bend_of(task.subspace.u.scalar_type());
  return independence(a.outside) > kIndependent &&
         is_accurate(b_gram, errors2_of(b_gram, bend), a_gram, errors2_of(a_gram, bend), result,
                     rounding_of(task.factors.b.scalar_type()));
}

}  // namespace

std::optional<Correction> correct_half_precision(const CorrectionTask& task, const CorrectionOptions& options) {
  if (!is_stored_in_half(task)) {
    return std::nullopt;
  }
  const auto& [factor_b, factor_a, scale] = task.factors;
  const auto transposed_a = factor_a.t();
  const Side b_side{factor_b, scale, task.subspace.u}, a_side{transposed_a, 1, task.subspace.v};
  const auto b = measured_side(b_side), a = measured_side(a_side);
  const double bend = bend_of(task.subspace.u.scalar_type());
  if (!knows_outside(b, bend) || !knows_outside(a, bend)) {
    return std::nullopt;
  }
  auto result =
      result_of(norms2(GramSides{b, a}), undo(b.coordinates, a.coordinates, task.subspace.s), task.attenuation);
  check_finite(result, task.label);

  const auto b_gram = gram_of_halves(b), a_gram = gram_of_halves(a);
  const int64_t r = factor_b.size(1), exact = exact_rank(result.gains, r, std::min(factor_b.size(0), factor_a.size(1)));
  const int64_t rank = result_rank(options, exact, r);
  if ((keeps_everything(result.gains) && rank == r) || !is_good_enough(task, b_gram, a, a_gram, result)) {
    return std::nullopt;
  }
  const auto mixtures = by_eigenvalues(root_of(b_gram), a_gram, result.gains, rank);
  result.factors.a = combined(a_side, a, mixtures.a, /*is_transposed=*/true, task.label);  // first, as it was read last
  result.factors.b = combined(b_side, b, mixtures.b, /*is_transposed=*/false, task.label);
  result.truncation_error = truncation_error(mixtures.singular, rank);
  const auto coordinates = [](const GramSide& side, const SmallMatrix& mixture) {
    return product(side.coordinates, first_rows(mixture, side.outside.rows()));
  };
  result.undo_after = rank < exact ? undo(coordinates(b, mixtures.b), coordinates(a, mixtures.a), task.subspace.s)
                                   : result.gains.aligned * result.undo;
  return result;
}

}  // namespace csulora
