#pragma once
// src/cuda/ptx/barrier.cuh for the simulator: mbarriers that count bulk copies.

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace twell::cuda::ptx {

inline void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  cuda_sim::init_barrier(shared_address(barrier), static_cast<int>(arrivals));
}

inline void fence_mbarrier_init() {}

inline void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  cuda_sim::arrive_at_barrier(shared_address(barrier), bytes);
}

inline void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  cuda_sim::wait_at_barrier(shared_address(barrier), parity);
}

inline void fence_async_proxy() {}

}  // namespace twell::cuda::ptx
