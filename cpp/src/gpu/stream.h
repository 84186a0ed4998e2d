#pragma once

#include <c10/core/Device.h>

namespace csulora {

/// The stream that torch launches on at the moment, for a GPU: a cudaStream_t.
void* current_stream(const c10::Device& device);

}  // namespace csulora
