#pragma once

#include <ATen/core/Tensor.h>

#include "extract/displacement.h"

namespace csulora {

/// displacement() for checked matrices on a GPU: rounding follows from the dtypes and magnitudes, and values are not
/// checked.
///
/// @throws InputError in a build without CUDA
Displacement displacement_on_device(const at::Tensor& base, const at::Tensor& aligned);

}  // namespace csulora
