#pragma once

#include <cstddef>
#include <functional>

namespace csulora {

/// Calls work(i) for i in [0, count) on as many threads as at::get_num_threads() allows, each of them computing alone:
/// results then depend neither on the number of threads nor on `count`.
///
/// If calls throw, the rest are still made, and the exception of the smallest i is thrown.
void for_each_in_parallel(size_t count, const std::function<void(size_t)>& work);

/// Calls work(i) for i in [0, count): in parallel where a CPU's threads do it, in order where one queue of a GPU does.
void for_each(size_t count, bool on_device, const std::function<void(size_t)>& work);

/// for_each_in_parallel for work without LAPACK, on the threads that torch keeps: between its own operations those spin
/// for milliseconds, in which new threads would get half of each core.
void for_each_on_torch_threads(size_t count, const std::function<void(size_t)>& work);

}  // namespace csulora
