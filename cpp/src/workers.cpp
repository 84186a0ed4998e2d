#include "workers.h"

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

/// Keeps torch, and MKL under it, from using further threads in the calling thread.
void compute_alone() {
  at::get_num_threads();  // A thread's first call sets its number of threads, and must not do so later.
  omp_set_num_threads(1);
  if (MKL_Set_Num_Threads_Local) {
    MKL_Set_Num_Threads_Local(1);
  }
}

}  // namespace

// Threads rather than at::parallel_for: inside its OpenMP region, once at::set_num_threads was called, MKL's QR waits
// forever for threads that a nested region does not get.
void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work) {
  std::vector<std::exception_ptr> errors(count);
  std::atomic<size_t> next{0};
  const auto worker = [&] {
    compute_alone();
    for (size_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  };
  {
    std::vector<std::jthread> threads(std::min<size_t>(count, at::get_num_threads()));
    std::generate(threads.begin(), threads.end(), [&] { return std::jthread(worker); });
  }
  for (const auto& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace csulora
