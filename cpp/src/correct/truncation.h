#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "correct/split.h"
#include "csulora/correct.h"

namespace csulora {

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
