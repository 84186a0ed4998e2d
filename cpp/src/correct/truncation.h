#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "correct/split.h"
#include "csulora/correct.h"

namespace csulora {

/// The best approximation of a rank of X = [B_in, B_out] M [A_in, A_out]^T as mixtures of these columns, and its
/// singular values S: those of the core R_B M R_A^T = W S Z^T, where R are the roots of the columns. The factors share
/// each singular value, so that rounding them costs what rounding X would. No root is inverted, so dependent columns do
/// no harm.
struct Mixtures {
  SmallMatrix b;                 ///< (2r, rank)
  SmallMatrix a;                 ///< (2r, rank)
  std::vector<double> singular;  ///< of X, from the largest on
};

/// The mixtures from R_B and the Gram matrix G_A of a's columns: W are eigenvectors of R_B M G_A (R_B M)^T, and as Z =
/// (R_B M R_A^T)^T W S^-1, b's mixture is M G_A times a's mixture times S^-1. That takes half the time of singular
/// values, and hides those below 2^-26 of the largest; columns in float32 say nothing of them.
Mixtures by_eigenvalues(const SmallMatrix& b_root, const SmallMatrix& a_gram, const Gains& gains, int64_t rank);

/// |X - X_rank|^2 / |X|^2 for an X of these singular values, from the largest on.
double truncation_error(const std::vector<double>& singular, int64_t rank);

/// X of some rank, and what was given up to reach it.
struct Truncated {
  at::Tensor b;                 ///< (m, rank) of the dtype of the columns it was made from
  at::Tensor a;                 ///< (rank, n)
  SmallMatrix b_coordinates;    ///< (k, rank) U^T b, for an orthonormal basis
  SmallMatrix a_coordinates;    ///< (k, rank) V^T a^T
  double truncation_error = 0;  ///< |X - b a|^2 / |X|^2
};

/// The best approximation of rank `rank` of X = [B_in, B_out] M [A_in, A_out]^T with M = [[aligned, left], [right,
/// off]]. `b` and `a` are the splits of B (m, r) and A^T (n, r).
Truncated truncated_update(const SplitFactor& b, const SplitFactor& a, const Gains& gains, int64_t rank);

/// The best approximation of rank `rank` of what `factors`, float32 or float64, hold: balanced and not rounded.
///
/// @throws InputError, which begins with the label, where values are not finite or too large
Truncated truncated(const LoraFactors& factors, const Subspace& subspace, int64_t rank, const std::string& label);

}  // namespace csulora
