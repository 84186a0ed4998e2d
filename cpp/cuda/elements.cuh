#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "csulora/error.h"
#include "element.h"

namespace csulora::cuda {

__device__ inline float widened(__half value) { return __half2float(value); }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widened(float value) { return value; }

__device__ inline void round_to(__half& element, double value) { element = __double2half(value); }
__device__ inline void round_to(__nv_bfloat16& element, double value) { element = __double2bfloat16(value); }
__device__ inline void round_to(float& element, double value) { element = static_cast<float>(value); }

/// Calls visit(T{}) for the C++ type of an element.
template <typename Visit>
void visit_element(Element element, Visit visit) {
  switch (element) {
    case Element::half:
      return visit(__half{});
    case Element::bfloat16:
      return visit(__nv_bfloat16{});
    case Element::single:
      return visit(float{});
  }
  throw InternalError("unknown element type");
}

}  // namespace csulora::cuda
