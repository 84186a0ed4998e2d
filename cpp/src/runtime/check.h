#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <string>

#include "csulora/error.h"

namespace csulora {

/// Throws InputError with the concatenated message unless `ok`.
template <typename... Args>
void check(bool ok, const Args&... message) {
  if (!ok) {
    throw InputError(c10::str(message...));
  }
}

/// Throws InternalError with the concatenated message unless `ok`.
template <typename... Args>
void check_internal(bool ok, const Args&... message) {
  if (!ok) {
    throw InternalError(c10::str("internal error in csulora, please report it: ", message...));
  }
}

/// Throws InputError unless csulora computes on the device.
inline void check_device(const at::Tensor& tensor, const std::string& name) {
  check(tensor.is_cpu() || tensor.is_cuda(), name, " is on ", tensor.device().str(), "; move it to the CPU or a GPU");
}

/// Throws InputError unless both are on one device.
inline void check_same_device(const at::Tensor& tensor, const at::Tensor& other, const std::string& name) {
  check(tensor.device() == other.device(), name, " is on ", tensor.device().str(), " and another input on ",
        other.device().str(), "; move them to one device");
}

/// Throws InputError unless `tensor` is a defined, dense matrix on the CPU or a GPU.
inline void check_matrix_of_any_dtype(const at::Tensor& tensor, const std::string& name) {
  check(tensor.defined(), name, " is missing");
  check(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions; a matrix is needed");
  check(tensor.layout() == at::kStrided, name, " is sparse; pass a dense tensor");
  check(!tensor.is_neg(), name, " is a negated view of other numbers; pass tensor.resolve_neg()");
  check_device(tensor, name);
}

/// The same for matrices of the floating types that csulora stores.
inline void check_matrix(const at::Tensor& tensor, const std::string& name) {
  check_matrix_of_any_dtype(tensor, name);
  const auto dtype = tensor.scalar_type();
  check(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat, name, " is ", c10::toString(dtype),
        "; float16, bfloat16 or float32 is needed");
}

/// Throws InputError, which begins with the label, unless a corrected factor fits the dtype that it is rounded to.
inline void check_fits(bool fits, at::ScalarType dtype, const std::string& label) {
  check(fits, label, ": the corrected update is too large for ", c10::toString(dtype),
        "; save the adapter as float32, or with smaller factors");
}

}  // namespace csulora
