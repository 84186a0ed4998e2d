#pragma once

#include <string>

#include "csulora/correct.h"

namespace csulora {

/// A stored matrix in float32 or float64.
at::Tensor widened(const at::Tensor& matrix, at::ScalarType dtype);

/// @throws InputError, which begins with the label, if the largest magnitude of a factor does not fit, and for NaN
void check_stored(double largest, at::ScalarType dtype, const std::string& label);

/// Corrected factors rounded to the storage types of those they replace, scale 1 and contiguous.
///
/// @throws InputError if an entry does not fit, and for NaN
LoraFactors stored(const at::Tensor& b, const at::Tensor& a, const CorrectionTask& task);

}  // namespace csulora
