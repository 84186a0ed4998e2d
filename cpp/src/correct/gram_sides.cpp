#include "correct/gram_sides.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "correct/measurement.h"

namespace csulora {
namespace {

/// <one, other>; not negative for Gram matrices, whatever rounding made of them.
double inner(const SmallMatrix& one, const SmallMatrix& other) {
  return std::max(0.0, std::inner_product(one[0], one[one.rows()], other[0], 0.0));
}

/// matrix^T matrix.
SmallMatrix gram(const SmallMatrix& matrix) { return product(transposed(matrix), matrix); }

/// [left, right].
SmallMatrix side_by_side(const SmallMatrix& left, const SmallMatrix& right) {
  SmallMatrix result(left.rows(), left.columns() + right.columns());
  for (int64_t i = 0; i < result.rows(); ++i) {
    std::copy_n(right[i], right.columns(), std::copy_n(left[i], left.columns(), result[i]));
  }
  return result;
}

SmallMatrix difference(SmallMatrix one, const SmallMatrix& other) {
  std::transform(one[0], one[one.rows()], other[0], one[0], std::minus<double>());
  return one;
}

/// |left right^T + diag(added)|^2.
double aligned_norm2(const SmallMatrix& left, const SmallMatrix& right, const std::vector<double>& added) {
  double sum = inner(gram(left), gram(right));
  for (size_t i = 0; i < added.size(); ++i) {
    sum += added[i] * (2 * std::inner_product(left[i], left[i + 1], right[i], 0.0) + added[i]);
  }
  return std::max(sum, 0.0);
}

/// |f_i|^2 of a column of F.
double column_norm2(const GramSide& side, int64_t column) {
  double sum = side.outside[column][column];
  for (int64_t i = 0; i < side.coordinates.rows(); ++i) {
    sum += side.coordinates[i][column] * side.coordinates[i][column];
  }
  return sum;
}

/// F^T F from the Gram matrix of [inside, outside].
SmallMatrix factor_gram(const SplitFactor& split) {
  const auto& halves = split.gram;
  const int64_t r = halves.rows() / 2;
  SmallMatrix result(r, r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      result[i][j] = halves[i][j] + halves[i][r + j] + halves[r + i][j] + halves[r + i][r + j];
    }
  }
  return result;
}

}  // namespace

GramSide gram_side(const SplitFactor& split) {
  const int64_t r = split.gram.rows() / 2;
  GramSide result{split.coordinates, {r, r}};
  for (int64_t i = 0; i < r; ++i) {
    std::copy_n(split.gram[r + i] + r, r, result.outside[i]);
  }
  return result;
}

GramSide attenuated(GramSide side, const std::vector<double>& gains) {
  auto& coordinates = side.coordinates;
  for (size_t i = 0; i < gains.size(); ++i) {
    std::transform(coordinates[i], coordinates[i + 1], coordinates[i], [&](double entry) { return gains[i] * entry; });
  }
  return side;
}

Components norms2(const GramSides& update) {
  const auto& [b, a, added] = update;
  return {aligned_norm2(b.coordinates, a.coordinates, added), inner(gram(b.coordinates), a.outside),
          inner(b.outside, gram(a.coordinates)), inner(b.outside, a.outside)};
}

std::vector<double> stretches(const GramSides& update) {
  std::vector<double> result(update.b.outside.rows(), 1);
  for (size_t i = 0; i < result.size(); ++i) {
    const auto column = static_cast<int64_t>(i);
    const double written = column_norm2(update.b, column), read = column_norm2(update.a, column);
    if (written > 0 && read > 0) {
      result[i] = std::pow(read / written, 0.25);
    }
  }
  return result;
}

bool rounds_well(const GramSides& update) {
  constexpr double kCancelled = 4;
  const auto& [b, a, added] = update;
  double apart = std::inner_product(added.begin(), added.end(), added.begin(), 0.0);
  for (int64_t i = 0; i < b.outside.rows(); ++i) {
    apart += column_norm2(b, i) * column_norm2(a, i);
  }
  return apart <= kCancelled * total(norms2(update));
}

double distance(const GramSides& x, const GramSides& update) {
  const auto b = difference(x.b.coordinates, update.b.coordinates);
  const auto a = difference(x.a.coordinates, update.a.coordinates);
  const double aligned =
      aligned_norm2(side_by_side(b, x.b.coordinates), side_by_side(update.a.coordinates, a), x.added);
  return std::sqrt(aligned + inner(gram(b), x.a.outside) + inner(x.b.outside, gram(a)));
}

bool accurate_in_float(const GramSides& x, const GramSides& update) {
  double error2 = 0;
  for (int64_t i = 0; i < x.b.outside.rows(); ++i) {
    error2 += column_norm2(update.b, i) * column_norm2(x.a, i) + column_norm2(x.b, i) * column_norm2(update.a, i);
  }
  const double tolerance = kFloatTolerance / kFloatRounding;
  return error2 <= tolerance * tolerance * total(norms2(x));
}

Energy energy(const SplitFactor& b, const SplitFactor& a, int64_t left, int64_t right) {
  const auto b_gram = factor_gram(b), a_gram = factor_gram(a);
  const double written = inner(gram(first_rows(b.coordinates, left)), a_gram);
  const double read = inner(b_gram, gram(first_rows(a.coordinates, right)));
  return {(written + read) / 2, inner(b_gram, a_gram)};
}

}  // namespace csulora
