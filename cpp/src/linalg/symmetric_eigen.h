#pragma once

#include <vector>

#include "linalg/small_matrix.h"

namespace csulora {

/// matrix = vectors^T diag(values) vectors.
struct SymmetricEigen {
  std::vector<double> values;  ///< (n) from the largest on
  SmallMatrix vectors;         ///< (n, n), one in each row
};

/// For a symmetric, finite matrix (n, n), with errors relative to the largest value. A few dozen rows take
/// Householder's reflections to a tridiagonal matrix and implicit QL steps (Golub & Van Loan, Matrix
/// Computations, 8.3), for which calling LAPACK takes about twice as long.
SymmetricEigen symmetric_eigen(SmallMatrix matrix);

}  // namespace csulora
