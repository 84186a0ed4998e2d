#pragma once

#include <vector>

#include "csulora/correct.h"

namespace csulora {

/// correct() on one GPU for tasks that have each been checked, one at least: results are on the same GPU, from work on
/// the current stream, which is waited for once, when what was measured is read.
///
/// @throws InputError as correct(), for tasks on several devices, and in a build without CUDA
/// @throws DeviceError where the GPU fails
std::vector<Correction> correct_on_device(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options);

}  // namespace csulora
