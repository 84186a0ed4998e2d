#include "device.h"

void* csulora::current_stream(const at::Device&) { return nullptr; }
