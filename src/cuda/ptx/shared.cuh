#pragma once
// Shared memory: its address space, and the part whose size a launch names.

#include <cstdint>

namespace twell::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The CTA's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) std::uint8_t twell_dynamic_shared[];
  return reinterpret_cast<T*>(twell_dynamic_shared);
}

}  // namespace twell::cuda::ptx
