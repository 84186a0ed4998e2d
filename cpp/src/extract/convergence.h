#pragma once

#include "extract/decomposition.h"

namespace csulora {

/// Approximate singular values of a matrix, and how far their triples are from being its own.
struct RitzValues {
  at::Tensor values;     ///< (j) float64, descending
  at::Tensor residuals;  ///< (j) float64, |A v - s u| or |A^T u - s v|, whichever is not zero, and rounding
};

/// Whether the leading `count` triples have converged, and the next value is known well enough, or is as good as zero,
/// to say that it is no target and to measure the gap to it.
///
/// @param count      of the target values, fewer than there are
/// @param tolerance  every target triple's residual is at most that times its value
bool converged(const RitzValues& ritz, int64_t count, const TargetCount& target_count, double tolerance);

}  // namespace csulora
