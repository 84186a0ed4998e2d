#include "handles.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "status.h"

namespace csulora::cuda {
namespace {

/// Idle handles by device and stream.
class Pool {
 public:
  using Place = std::pair<int, cudaStream_t>;

  /// Never destroyed: when a process ends, the CUDA runtime may be gone before the pool's turn comes.
  static Pool& instance() {
    static Pool& pool = *new Pool;
    return pool;
  }

  std::unique_ptr<Handles> take(const Place& place) {
    {
      const std::lock_guard lock(mutex_);
      if (auto& idle = idle_[place]; !idle.empty()) {
        auto handles = std::move(idle.back());
        idle.pop_back();
        return handles;
      }
    }
    return std::make_unique<Handles>();
  }

  void give_back(const Place& place, std::unique_ptr<Handles> handles) {
    const std::lock_guard lock(mutex_);
    idle_[place].push_back(std::move(handles));
  }

 private:
  std::mutex mutex_;
  std::map<Place, std::vector<std::unique_ptr<Handles>>> idle_;
};

}  // namespace

Handles::Handles() {
  cublasHandle_t new_blas = nullptr;
  check(cublasCreate(&new_blas), "cublasCreate");
  blas.reset(new_blas);
  cusolverDnHandle_t new_solver = nullptr;
  check(cusolverDnCreate(&new_solver), "cusolverDnCreate");
  solver.reset(new_solver);
  cusolverDnParams_t new_params = nullptr;
  check(cusolverDnCreateParams(&new_params), "cusolverDnCreateParams");
  params.reset(new_params);
}

HandleLease::HandleLease(cudaStream_t stream) : stream_(stream) {
  check(cudaGetDevice(&device_), "cudaGetDevice");
  handles_ = Pool::instance().take({device_, stream_});
  check(cublasSetStream(blas(), stream), "cublasSetStream");
  check(cusolverDnSetStream(solver(), stream), "cusolverDnSetStream");
}

HandleLease::~HandleLease() { Pool::instance().give_back({device_, stream_}, std::move(handles_)); }

void HandleLease::use_workspace(void* workspace, size_t size) const {
  check(cublasSetWorkspace(blas(), workspace, size), "cublasSetWorkspace");
}

}  // namespace csulora::cuda
