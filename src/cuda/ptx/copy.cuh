#pragma once
// Copies from global to shared memory: 16-byte cp.async, and tiles by the tensor memory
// accelerator (TMA).

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace twell::cuda::ptx {

// 16 bytes through L2 only; zeros if `valid` is false (then nothing is read).
__device__ __forceinline__ void copy_async_16(std::uint32_t shared, const void* global,
                                              bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Keeps `pointer` in registers of its own instead of having it derived anew for each use, which
// would have to wait until the load units have read the copy before last's address.
template <class T>
__device__ __forceinline__ void pin(const T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at the barrier, as one of its expected arrivals, once this thread's copies so far are
// done. The waiting thread owes a fence_async_proxy before WGMMA reads them.
__device__ __forceinline__ void copy_async_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Asks for `bytes`, a multiple of 16, at a 16-byte aligned address to be in L2 soon (sm_90 and
// newer; before that it does nothing). It reads no value: what is written meanwhile is not missed.
__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* global,
                                            [[maybe_unused]] std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// Loads the box at (inner, outer) of a two-dimensional tensor; elements outside are zeros.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map,
                                         std::uint64_t* barrier, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
      : "memory");
}

// As tma_load, to the same offset in every CTA of the cluster whose bit is set in `ctas`; each
// CTA's own barrier counts the bytes.
__device__ __forceinline__ void tma_load_multicast(void* shared, const CUtensorMap* map,
                                                   std::uint64_t* barrier, int inner, int outer,
                                                   std::uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer), "h"(ctas)
      : "memory");
}

}  // namespace twell::cuda::ptx
