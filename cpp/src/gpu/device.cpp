#include <algorithm>

#include "gpu/correction_device.h"

namespace csulora {

bool any_on_device(const std::vector<CorrectionTask>& tasks) {
  return std::any_of(tasks.begin(), tasks.end(),
                     [](const auto& task) { return task.factors.b.defined() && !task.factors.b.is_cpu(); });
}

}  // namespace csulora
