#pragma once

#include <cmath>
#include <cstdint>

/// What the largest singular value of a displacement's storage rounding can reach: below it, nothing can be told from
/// rounding.
///
/// Rounding leaves errors of variance v_ij that do not depend on each other. The norm of such a matrix is at most about
/// max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij) (Bandeira & van Handel 2016), which is sigma (sqrt m + sqrt n)
/// where the variance is the same everywhere, and also covers rows or columns that are larger than the rest.
namespace csulora {

/// The noise edge from the largest sum along a row and along a column of both matrices' squared spacings.
///
/// Two values rounded to grids of spacings h and h' differ by an error of variance (h^2 + h'^2) / 12 if they lie far
/// apart, and of up to h^2 / 4 if they lie half a spacing apart on one grid. (h^2 + h'^2) / 8 covers both.
inline double noise_edge(double row_spacings2, double column_spacings2) {
  return (std::sqrt(row_spacings2) + std::sqrt(column_spacings2)) / std::sqrt(8.0);
}

/// The noise edge of an (m, n) matrix whose entries all have errors of one standard deviation.
inline double noise_edge(double noise_std, int64_t rows, int64_t columns) {
  return noise_std * (std::sqrt(rows) + std::sqrt(columns));
}

}  // namespace csulora
