#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

/// What the largest singular value of a displacement's storage rounding can reach: below it, nothing can be told from
/// rounding.
///
/// Rounding leaves errors that do not depend on each other, whose variances differ as the magnitudes of rows and
/// columns do. The norm of such a matrix is the edge of its spectrum, but for fluctuations that a small margin covers.
namespace csulora {

/// The noise edge from the sums of entries' rounding variances along each row and each column.
///
/// Two values rounded to grids of spacings h and h' differ by an error of variance (h^2 + h'^2) / 12 if they lie so far
/// apart that their places on the grids do not depend on each other: where the square of their stored difference is
/// at least 2 (h^2 + h'^2). Otherwise it is up to h^2 / 4, for values that lie half a spacing apart on one grid, and
/// (h^2 + h'^2) / 8 covers both.
double noise_edge(const std::vector<double>& row_variances, const std::vector<double>& column_variances);

/// The edge of the singular values of a large matrix whose independent entries have variances r_i c_j / sum(r).
///
/// The squared edge is the least z(s) over 0 < s < 1 / max b, where s = sum_i a_i / (z - a_i t(s)) and
/// t(s) = sum_j b_j / (1 - s b_j), with a = r / sqrt(sum r) and b likewise (Paul & Silverstein 2009; Couillet & Hachem
/// 2014). It is sigma (sqrt m + sqrt n) where the variance is the same everywhere.
///
/// @param rows, columns  sums of the variances along each row and each column; both have the same total
double spectral_edge(const std::vector<double>& rows, const std::vector<double>& columns);

/// The noise edge of an (m, n) matrix whose entries all have errors of one standard deviation.
inline double noise_edge(double noise_std, int64_t rows, int64_t columns) {
  return noise_std * (std::sqrt(rows) + std::sqrt(columns));
}

}  // namespace csulora
