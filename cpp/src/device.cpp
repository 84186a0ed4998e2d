#include "check.h"
#include "correction_device.h"

namespace csulora {

at::Device common_device(const std::vector<CorrectionTask>& tasks) {
  const auto& first = tasks.front().pair.b;
  for (const auto& task : tasks) {
    check_same_device(task.pair.b, first, task.label + ": b");
    check_same_device(task.pair.a, first, task.label + ": a");
    check_same_device(task.subspace.u, first, task.label + ": the subspace's u");
  }
  return first.device();
}

}  // namespace csulora
