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

/// What bounds the variances of rounding errors along one row or column of D.
///
/// Two values rounded to grids of spacings h and h' differ by an error of variance (h^2 + h'^2) / 12 if they lie so far
/// apart that their places on the grids do not depend on each other: where the square of their stored difference is
/// at least 2 (h^2 + h'^2). Otherwise it is up to h^2 / 4, for values that lie half a spacing apart on one grid, and
/// (h^2 + h'^2) / 8 covers both.
///
/// Less is possible on one grid. A weight anywhere between two of its numbers that moves by p < 1 spacings is stored
/// one spacing away with probability p, else where it was: the error has variance p (1 - p) h^2. For any q,
/// p (1 - p) <= (1 - p) q^2 + p (1 - q)^2, a tangent of the left side, so that q^2 h^2 for entries that stayed and
/// (1 - q)^2 h^2 for those that stepped add up to no less than the variances, on average. The least such sum over
/// q <= 1/2 is near * q (1 - q) with q = stepped / near.
struct RoundingSums {
  double variances = 0;  ///< (h^2 + h'^2) / 12 or / 8 of entries that moved far, or whose grids differ
  double near = 0;       ///< h^2 of the others: both numbers lie on one grid, at most a spacing h apart
  double stepped = 0;    ///< h^2 of those among them that lie a spacing apart
};

/// The bound on the sum of the variances.
///
/// Weights that lie on the grid, as a model trained on from its stored form has them, leave no error of the base. Their
/// displacement is rounded itself: what is below h / 2 vanishes, and is an error of variance h^2 / 12 if it is spread
/// evenly. So near entries have at least that. What rounding adds to a multiple of the displacement has a variance of
/// at most q (1 - q) h^2 there, too.
double rounding_variance(const RoundingSums& sums);

/// The noise edge from the sums of entries' rounding variances along each row and each column: the edge of the
/// spectrum with a margin for fluctuations, and no less than a single entry's error can be.
double noise_edge(const std::vector<double>& row_variances, const std::vector<double>& column_variances);

/// The edge of the singular values of a large matrix whose independent entries have variances r_i c_j / sum(r).
///
/// The squared edge is the least z(s) over 0 < s < 1 / max b, where s = sum_i a_i / (z - a_i t(s)) and
/// t(s) = sum_j b_j / (1 - s b_j), with a = r / sqrt(sum r) and b likewise (Paul & Silverstein 2009; Couillet & Hachem
/// 2014). It is sigma (sqrt m + sqrt n) where the variance is the same everywhere.
///
/// @param rows, columns  sums of the variances along each row and each column, or bounds on them; their totals may
///                       differ then, and the larger counts
double spectral_edge(const std::vector<double>& rows, const std::vector<double>& columns);

/// The noise edge of an (m, n) matrix whose entries all have errors of one standard deviation.
inline double noise_edge(double noise_std, int64_t rows, int64_t columns) {
  return noise_std * (std::sqrt(rows) + std::sqrt(columns));
}

}  // namespace csulora
