#pragma once
// src/cuda/ptx/shared.cuh for the simulator: a shared address is an offset into the dynamic part.

#include <cstddef>
#include <cstdint>

#include "simulator.h"

namespace twell::cuda::ptx {

inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(pointer) -
                                    cuda_sim::dynamic_shared());
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_sim::dynamic_shared());
}

}  // namespace twell::cuda::ptx
