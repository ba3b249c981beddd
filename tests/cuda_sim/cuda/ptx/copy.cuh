#pragma once
// src/cuda/ptx/copy.cuh for the simulator, without the tensor memory accelerator.

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace twell::cuda::ptx {

inline void copy_async_16(std::uint32_t shared, const void* global, bool valid) {
  cuda_sim::copy_async(shared, valid ? global : nullptr);
}

inline void copy_async_commit() { cuda_sim::commit_copies(); }

template <int kPending>
void copy_async_wait() {
  cuda_sim::wait_for_copies(kPending);
}

inline void prefetch_l2(const void* global, std::uint32_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    cuda_sim::fault("a prefetch that is not of 16-byte aligned pieces");
  }
}

}  // namespace twell::cuda::ptx
