#pragma once

#include <ATen/core/Tensor.h>

namespace csulora {

/// Orthonormalises the rows of `block` (b, length) float32 in place, b <= length: by the Cholesky factor of their Gram
/// matrix where they are far from dependent, and else by Householder QR, which is slower. A second call removes what
/// the first leaves.
///
/// @return lower triangle (b, b) that times the new rows gives the old ones, float32
at::Tensor orthonormalise(const at::Tensor& block);

}  // namespace csulora
