#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "csulora/correct.h"

namespace csulora {

/// Whether a tensor is elsewhere than on the CPU; one that is missing is not.
bool is_on_device(const at::Tensor& tensor);

/// Whether a task is.
inline bool any_on_device(const std::vector<CorrectionTask>& tasks) {
  return std::any_of(tasks.begin(), tasks.end(), [](const auto& task) { return is_on_device(task.factors.b); });
}

}  // namespace csulora
