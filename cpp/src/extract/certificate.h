#pragma once

#include <cstdint>
#include <optional>

#include "csulora/subspace.h"
#include "extract/displacement.h"

namespace csulora {

/// What is known of the best k directions that there are.
struct Optimum {
  at::Tensor upper;           ///< (k + 1) float64, upper estimates of the leading singular values
  double largest_energy = 0;  ///< no k directions capture more of |D|^2
};

/// Measures residuals, captured energy and orthonormality of stored factors.
///
/// @param standing_out  how many leading directions the angle is certified for; absent: the most for which it is small
/// @return everything but above_noise and passes
Certificate measure_factors(const Displacement& d, const Subspace& subspace, const Optimum& optimum,
                            std::optional<int64_t> standing_out);

}  // namespace csulora
