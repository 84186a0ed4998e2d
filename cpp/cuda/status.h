#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

namespace csulora::cuda {

/// Throws DeviceMemoryError if memory ran out, and DeviceError for any other failure; `call` names what failed.
void check(cudaError_t status, const char* call);
void check(cublasStatus_t status, const char* call);
void check(cusolverStatus_t status, const char* call);

}  // namespace csulora::cuda
