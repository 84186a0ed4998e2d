#include "status.h"

#include <string>

#include "csulora/error.h"

namespace csulora::cuda {
namespace {

[[noreturn]] void fail(bool out_of_memory, const char* call, const std::string& reason) {
  const auto message = std::string(call) + " failed: " + reason;
  if (out_of_memory) {
    throw DeviceMemoryError(message + "; free GPU memory, or compute on the CPU");
  }
  throw DeviceError(message);
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next check, of another call, would report this failure once more
    fail(status == cudaErrorMemoryAllocation, call, cudaGetErrorString(status));
  }
}

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail(status == CUBLAS_STATUS_ALLOC_FAILED, call, cublasGetStatusString(status));
  }
}

void check(cusolverStatus_t status, const char* call) {
  if (status != CUSOLVER_STATUS_SUCCESS) {
    fail(status == CUSOLVER_STATUS_ALLOC_FAILED, call, "cuSOLVER status " + std::to_string(status));
  }
}

}  // namespace csulora::cuda
