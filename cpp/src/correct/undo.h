#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "linalg/small_matrix.h"

namespace csulora {

/// -<X, U S V^T> / |S|^2 for X = b a^T + U diag(added) V^T; 0 where S is 0 or has no value.
///
/// @param b, a   (k, r) coordinates U^T b and V^T a
/// @param s      (k) singular values, of any dtype and device
/// @param added  multiples along the first directions, at most k
double undo(const SmallMatrix& b, const SmallMatrix& a, const at::Tensor& s, const std::vector<double>& added = {});

}  // namespace csulora
