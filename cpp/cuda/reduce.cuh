#pragma once

#include "launch.cuh"

namespace csulora::cuda {

/// The sum of one value per thread of the block, in a fixed order, for all of its threads.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // whoever still reads the sum before this one
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  __syncthreads();
  return sums[0];
}

}  // namespace csulora::cuda
