#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <memory>
#include <type_traits>

namespace csulora::cuda {

template <typename Handle, auto destroy>
struct Destroy {
  void operator()(Handle handle) const { destroy(handle); }
};

template <typename Handle, auto destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<Handle, destroy>>;

/// One of each library handle, made for the current device.
struct Handles {
  Handles();

  Owned<cublasHandle_t, cublasDestroy> blas;
  Owned<cusolverDnHandle_t, cusolverDnDestroy> solver;
  Owned<cusolverDnParams_t, cusolverDnDestroyParams> params;
};

/// Handles for work on one stream of the current device, for the lifetime of the lease.
///
/// Making handles costs milliseconds and may wait for the device, so they are kept. Two leases share handles only one
/// after the other and on the same stream, where whatever the libraries keep in them is used in order.
class HandleLease {
 public:
  /// @throws DeviceError where there is no device, or a library cannot be initialised
  explicit HandleLease(cudaStream_t stream);
  ~HandleLease();
  HandleLease(const HandleLease&) = delete;
  HandleLease& operator=(const HandleLease&) = delete;

  /// Lets cuBLAS use this device memory, 256-byte aligned, until the lease ends, rather than allocate its own.
  void use_workspace(void* workspace, size_t size) const;

  cublasHandle_t blas() const { return handles_->blas.get(); }
  cusolverDnHandle_t solver() const { return handles_->solver.get(); }
  cusolverDnParams_t params() const { return handles_->params.get(); }
  cudaStream_t stream() const { return stream_; }

 private:
  int device_ = 0;
  cudaStream_t stream_;
  std::unique_ptr<Handles> handles_;
};

}  // namespace csulora::cuda
