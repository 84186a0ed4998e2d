#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "status.h"

namespace csulora::cuda {

inline constexpr unsigned kThreads = 256;

/// Launches kernel(arguments...) with kThreads threads per block and checks the launch. cudaLaunchKernel rather than
/// the triple angle brackets: the same source then also compiles as plain C++, for tests without a GPU.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream, const char* name,
            std::type_identity_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(kernel, grid, dim3(kThreads), pointers, 0, stream), name);
}

/// Blocks for `items` per batch entry, with the entry as blockIdx.y; the kernel strides over what exceeds them.
inline dim3 grid_for(int64_t items, int64_t entries) {
  constexpr int64_t kMostBlocks = 1024;
  const int64_t blocks = std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, kMostBlocks);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(entries));
}

}  // namespace csulora::cuda
