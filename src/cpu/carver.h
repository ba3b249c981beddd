#pragma once

#include <cstddef>
#include <cstdint>

namespace twell::cpu {

inline constexpr std::size_t kAlignment = 64;

// Cuts 64-byte-aligned arrays out of one buffer; with a null base it only measures.
class Carver {
 public:
  explicit Carver(const void* base = nullptr)
      : base_(const_cast<std::byte*>(static_cast<const std::byte*>(base))) {}

  template <class T>
  T* take(std::int64_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }

  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace twell::cpu
