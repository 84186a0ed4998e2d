#include "gpu/correction_device.h"
#include "gpu/displacement_device.h"
#include "runtime/check.h"

// Stands for correction_device.cpp and displacement_device.cpp in a build that computes on the CPU alone.
namespace csulora {
namespace {

[[noreturn]] void refuse(const at::Tensor& tensor) {
  throw InputError("a tensor is on " + tensor.device().str() +
                   ", and this build of csulora computes on the CPU; move it there, or build with CUDA");
}

}  // namespace

std::vector<Correction> correct_on_device(const std::vector<CorrectionTask>& tasks, const CorrectionOptions&) {
  refuse(tasks.front().factors.b);
}

Displacement displacement_on_device(const at::Tensor& base, const at::Tensor&, std::optional<double>) { refuse(base); }

}  // namespace csulora
