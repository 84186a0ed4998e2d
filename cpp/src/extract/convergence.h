#pragma once

#include "extract/decomposition.h"

namespace csulora {

/// Approximate singular values of a matrix, and how far their triples are from being its own.
struct RitzValues {
  RitzValues(at::Tensor values, at::Tensor residual_vectors);

  at::Tensor values;            ///< (j) float64, descending
  at::Tensor residual_vectors;  ///< (j, p) float64, A v - s u or A^T u - s v, whichever is not zero, in any basis
  at::Tensor residuals;         ///< (j) float64, their lengths, and rounding
};

/// By what factor the leading `count` triples fall short of what `accuracy` asks for: at most 1 where each has
/// converged by its residual, or those that stand out have and the rest meet the gap-free guarantee.
///
/// @param count  of the target values, fewer than there are
double shortfall(const RitzValues& ritz, int64_t count, const TargetCount& target_count, const Accuracy& accuracy);

/// No `count` directions capture more of |A|_F^2 than this, unless the random start block missed a leading one.
///
/// With A v = s u and A^T u = s v + e, where e is orthogonal to every v, A^T A is diag(s^2) on the span of v and s e
/// beside it. So its leading eigenvalues sum up to at most sum s^2 and the sum of the singular values of all s e
/// (Fan 1949), as long as nothing outside of the span exceeds s_count.
double largest_energy(const RitzValues& ritz, int64_t count);

/// Upper estimates of the leading `count` + 1 singular values, (count + 1) float64.
at::Tensor upper_values(const RitzValues& ritz, int64_t count);

}  // namespace csulora
