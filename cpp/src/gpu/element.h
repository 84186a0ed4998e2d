#pragma once

#include <ATen/core/Tensor.h>

#include "csulora/error.h"
#include "cuda/element.h"

namespace csulora {

/// How the device code calls a tensor's dtype, which check_matrix has let through.
inline cuda::Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return cuda::Element::half;
    case at::kBFloat16:
      return cuda::Element::bfloat16;
    case at::kFloat:
      return cuda::Element::single;
    default:
      throw InternalError("a dtype that check_matrix refuses");
  }
}

}  // namespace csulora
