#pragma once

namespace csulora::cuda {

/// What a matrix of the caller's is stored as.
enum class Element { half, bfloat16, single };

}  // namespace csulora::cuda
