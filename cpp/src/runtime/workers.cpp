#include "runtime/workers.h"

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "runtime/cpu_quota.h"

// Part of every torch that is built with MKL; null in others.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace csulora {
namespace {

/// How many threads work of the calling thread may use; 0: as many as torch may.
thread_local int own_workers = 0;

int workers() { return own_workers > 0 ? own_workers : std::min(at::get_num_threads(), cpu_quota()); }

/// Calls work(i) for the next i, until there is none.
class Queue {
 public:
  Queue(size_t count, const std::function<void(size_t)>& work) : work_(work), errors_(count) {}

  void take_all() {
    for (size_t i = next_++; i < errors_.size(); i = next_++) {
      try {
        work_(i);
      } catch (...) {
        errors_[i] = std::current_exception();
      }
    }
  }

  void rethrow_first_error() const {
    for (const auto& error : errors_) {
      if (error) {
        std::rethrow_exception(error);
      }
    }
  }

 private:
  const std::function<void(size_t)>& work_;
  std::vector<std::exception_ptr> errors_;
  std::atomic<size_t> next_{0};
};

}  // namespace

OwnThreads::OwnThreads() : OwnThreads(workers()) {}

OwnThreads::OwnThreads(int workers) : torch_threads_(at::get_num_threads()), workers_before_(own_workers) {
  own_workers = workers;
  omp_set_num_threads(1);  // after a thread's first at::get_num_threads(), which sets the number
  if (MKL_Set_Num_Threads_Local) {
    mkl_threads_ = MKL_Set_Num_Threads_Local(1);
  }
}

OwnThreads::~OwnThreads() {
  own_workers = workers_before_;
  omp_set_num_threads(torch_threads_);
  if (MKL_Set_Num_Threads_Local) {
    MKL_Set_Num_Threads_Local(mkl_threads_);
  }
}

// Threads rather than at::parallel_for: inside its OpenMP region, once at::set_num_threads was called, MKL's QR waits
// forever for threads that a nested region does not get.
void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work) {
  Queue queue(count, work);
  const auto worker = [&] {
    const OwnThreads alone(1);
    queue.take_all();
  };
  {
    const auto used = std::min<size_t>(count, workers());
    std::vector<std::jthread> threads(std::max<size_t>(used, 1) - 1);
    std::generate(threads.begin(), threads.end(), [&] { return std::jthread(worker); });
    worker();
  }
  queue.rethrow_first_error();
}

void for_each(size_t count, bool on_device, const std::function<void(size_t)>& work) {
  if (!on_device) {
    return for_each_in_parallel(count, work);
  }
  for (size_t i = 0; i < count; ++i) {
    work(i);
  }
}

}  // namespace csulora
