#pragma once

#include "csulora/subspace.h"
#include "extract/displacement.h"

namespace csulora {

/// Measures residuals, captured energy and orthonormality of stored factors.
///
/// @param next_value  upper estimate of the (k+1)-th singular value, which the gaps are taken from
/// @return everything but above_noise and passes
Certificate measure_factors(const Displacement& d, const Subspace& subspace, double next_value);

}  // namespace csulora
