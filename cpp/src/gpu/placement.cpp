#include "gpu/placement.h"

namespace csulora {

bool is_on_device(const at::Tensor& tensor) { return tensor.defined() && !tensor.is_cpu(); }

}  // namespace csulora
