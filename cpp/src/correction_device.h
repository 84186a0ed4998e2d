#pragma once

#include <vector>

#include "csulora/correction.h"

namespace csulora {

/// The device that all tensors of all tasks are on. Every task has been checked by itself.
///
/// @throws InputError if they are on several
at::Device common_device(const std::vector<CorrectionTask>& tasks);

/// correct() for checked tasks on one GPU: results are on the same GPU, from work on the current stream, which is
/// waited for once, when what was measured is read.
///
/// @throws InputError as correct(), and in a build without CUDA
/// @throws DeviceError where the GPU fails
std::vector<Correction> correct_on_device(const std::vector<CorrectionTask>& tasks, const CorrectionOptions& options);

}  // namespace csulora
