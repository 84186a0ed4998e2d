#pragma once

#include <cstddef>
#include <cstdint>

namespace csulora::cuda {

/// Hands out consecutive aligned pieces of one allocation. With no memory behind it (null), it only adds up sizes: the
/// same code that divides a workspace up then says how large it must be.
class Arena {
 public:
  static constexpr size_t kAlignment = 256;

  explicit Arena(void* memory) : memory_(static_cast<std::byte*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  /// Bytes handed out so far, padding included.
  size_t used() const { return used_; }

 private:
  std::byte* memory_;
  size_t used_ = 0;
};

}  // namespace csulora::cuda
