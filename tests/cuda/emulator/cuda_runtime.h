#pragma once

// Takes the place of CUDA's header of this name, so that device code compiles as C++ and runs on the CPU: the threads
// of a block as fibers, one block after the other, all memory the host's. For tests of what the code computes; what a
// GPU does beyond that (races between blocks, asynchrony) is not emulated.

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>

#undef __shared__
#define __shared__ static thread_local

inline thread_local uint3 threadIdx{};
inline thread_local uint3 blockIdx{};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};

/// Returns when all threads of the block have come here.
void __syncthreads();

namespace emulator {

void run(dim3 grid, dim3 block, const std::function<void()>& thread);

template <typename... Parameters, size_t... i>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<i...>) {
  kernel(*static_cast<Parameters*>(arguments[i])...);
}

}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  emulator::run(grid, block, [&] { emulator::call(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
  return cudaSuccess;
}
