#include "gpu/correction_device.h"
#include "gpu/device.h"

void* csulora::current_stream(const at::Device&) { return nullptr; }

/// The host's memory stands for the device's.
bool csulora::any_on_device(const std::vector<CorrectionTask>&) { return true; }
