#pragma once

#include <cstddef>
#include <functional>

namespace csulora {

/// As long as it lives, torch, and MKL under it, compute alone in the thread: parallel is what for_each_in_parallel
/// makes so. OpenMP's threads spin while they wait for one another, which takes many times as long where other
/// processes compute on the same cores.
class OwnThreads {
 public:
  OwnThreads();
  ~OwnThreads();
  OwnThreads(const OwnThreads&) = delete;
  OwnThreads& operator=(const OwnThreads&) = delete;

 private:
  friend void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work);
  explicit OwnThreads(int workers);

  int torch_threads_;
  int mkl_threads_ = 0;  // 0: as many as MKL was told globally
  int workers_before_;
};

/// Calls work(i) for i in [0, count) on as many threads as at::get_num_threads() and the CPU quota of the process's
/// control group allow, each of them computing alone: results then depend neither on the number of threads nor on
/// `count`. Within such work there is one thread.
///
/// If calls throw, the rest are still made, and the exception of the smallest i is thrown.
void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work);

/// Calls work(i) for i in [0, count): in parallel where a CPU's threads do it, in order where one queue of a GPU does.
void for_each(size_t count, bool on_device, const std::function<void(size_t)>& work);

}  // namespace csulora
