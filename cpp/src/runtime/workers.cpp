#include "runtime/workers.h"

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

// Part of every torch that is built with MKL; null in others.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace csulora {
namespace {

/// Keeps torch, and MKL under it, from using further threads in the calling thread, as long as it lives.
class ComputeAlone {
 public:
  ComputeAlone() : threads_(at::get_num_threads()) {  // A thread's first such call sets the number, so it comes first.
    omp_set_num_threads(1);
    if (MKL_Set_Num_Threads_Local) {
      mkl_threads_ = MKL_Set_Num_Threads_Local(1);
    }
  }
  ~ComputeAlone() {
    omp_set_num_threads(threads_);
    if (MKL_Set_Num_Threads_Local) {
      MKL_Set_Num_Threads_Local(mkl_threads_);
    }
  }
  ComputeAlone(const ComputeAlone&) = delete;
  ComputeAlone& operator=(const ComputeAlone&) = delete;

 private:
  int threads_;
  int mkl_threads_ = 0;  // 0: as many as MKL was told globally
};

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

// Threads rather than at::parallel_for: inside its OpenMP region, once at::set_num_threads was called, MKL's QR waits
// forever for threads that a nested region does not get.
void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work) {
  Queue queue(count, work);
  const auto worker = [&] {
    const ComputeAlone alone;
    queue.take_all();
  };
  {
    const size_t workers = std::min<size_t>(count, at::get_num_threads());
    std::vector<std::jthread> threads(std::max<size_t>(workers, 1) - 1);
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

void for_each_on_torch_threads(size_t count, const std::function<void(size_t)>& work) {
#ifdef __SANITIZE_THREAD__  // ThreadSanitizer does not see how OpenMP's threads wait for one another
  for_each_in_parallel(count, work);
#else
  Queue queue(count, work);
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { queue.take_all(); });
  queue.rethrow_first_error();
#endif
}

}  // namespace csulora
