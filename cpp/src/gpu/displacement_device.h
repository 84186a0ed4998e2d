#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "extract/displacement.h"

namespace csulora {

/// displacement() for checked matrices on a GPU; values are not checked.
///
/// @throws InputError in a build without CUDA
Displacement displacement_on_device(const at::Tensor& base, const at::Tensor& aligned, std::optional<double> noise_std);

}  // namespace csulora
