#include <ucontext.h>

#include <cstring>
#include <vector>

#include "cuda_runtime.h"

namespace {

/// The threads of one block, each with a stack of its own.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& thread) {
    fibers_.resize(std::max<size_t>(fibers_.size(), threads));
    thread_ = &thread;
    for (unsigned i = 0; i < threads; ++i) {
      auto& fiber = fibers_[i];
      fiber.stack.resize(size_t{64} << 10);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (bool all_done = false; !all_done;) {
      all_done = true;
      for (current_ = 0; current_ < threads; ++current_) {
        if (!fibers_[current_].done) {
          threadIdx = {current_, 0, 0};
          swapcontext(&scheduler_, &fibers_[current_].context);
          all_done = all_done && fibers_[current_].done;
        }
      }
    }
  }

  void wait() { swapcontext(&fibers_[current_].context, &scheduler_); }

  static Block& instance() {
    static thread_local Block block;
    return block;
  }

 private:
  struct Fiber {
    ucontext_t context{};
    std::vector<char> stack;
    bool done = false;
  };

  static void enter() {
    auto& block = instance();
    (*block.thread_)();
    block.fibers_[block.current_].done = true;
  }

  std::vector<Fiber> fibers_;
  ucontext_t scheduler_{};
  unsigned current_ = 0;
  const std::function<void()>* thread_ = nullptr;
};

}  // namespace

void __syncthreads() { Block::instance().wait(); }

void emulator::run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      Block::instance().run(block.x, thread);
    }
  }
}

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  std::memset(memory, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* memory, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) {
    std::memset(static_cast<char*>(memory) + row * pitch, value, width);
  }
  return cudaSuccess;
}
}
