#pragma once
// What the Hopper kernels share: the ring of shared-memory stages and the consumer's main loop.

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"

namespace twell::cuda::sm90 {

inline constexpr int kTileHidden = 64;  // summed elements of one stage: 128 bytes of bf16

template <class Shared>
__device__ __forceinline__ Shared& aligned_shared(std::uint8_t* raw) {
  const std::uint32_t offset =
      (0u - ptx::shared_address(raw)) & static_cast<std::uint32_t>(alignof(Shared) - 1);
  return *reinterpret_cast<Shared*>(raw + offset);
}

// A position in a ring of stages; `parity` is that of the stage's full barrier.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Who filled the stages that `multiply` reads.
enum class Filler { kTma, kTmaAndThreads };

// Starts acc[64, kN] += A[64, 64] B[64, kN] of the ring's stage; `acc` may not be touched until
// finish_stage.
template <int kN, ptx::Major kA, ptx::Major kB, Filler kFiller, int kStages, class A, class B>
__device__ __forceinline__ void start_stage(float (&acc)[kN / 2], const Ring<kStages>& ring,
                                            std::uint64_t* full, A&& a, B&& b) {
  ptx::mbarrier_wait(&full[ring.stage], ring.parity);
  if (kFiller == Filler::kTmaAndThreads) ptx::fence_async_proxy();
  const std::uint64_t a_first = ptx::wgmma_descriptor<kA>(a(ring.stage), 0);
  const std::uint64_t b_first = ptx::wgmma_descriptor<kB>(b(ring.stage), 64 * kTileHidden * 2);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileHidden / 16; ++k) {
    ptx::wgmma<kN, kA, kB>(acc, a_first + k * ptx::kWgmmaAdvance<kA>,
                           b_first + k * ptx::kWgmmaAdvance<kB>);
  }
  ptx::wgmma_commit();
}

// Waits for the products that were started; release(stage) hands their stage back.
template <int kStages, class Release>
__device__ __forceinline__ void finish_stage(Ring<kStages>& ring, Release&& release) {
  ptx::wgmma_wait<0>();
  release(ring.stage);
  ring.advance();
}

// acc[64, kN] += Σ over `steps` stages of A[64, 64] B[64, kN]. Waits for its own products at each
// stage: the other consumer's keep the tensor cores busy.
template <int kN, ptx::Major kA, ptx::Major kB, Filler kFiller, int kStages, class A, class B,
          class Release>
__device__ __forceinline__ void accumulate(float (&acc)[kN / 2], Ring<kStages>& ring, int steps,
                                           std::uint64_t* full, A&& a, B&& b, Release&& release) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    start_stage<kN, kA, kB, kFiller>(acc, ring, full, a, b);
    finish_stage(ring, release);
  }
  ptx::wgmma_pin(acc);
}

// The same from 0.
template <int kN, ptx::Major kA, ptx::Major kB, Filler kFiller, int kStages, class A, class B,
          class Release>
__device__ __forceinline__ void multiply(float (&acc)[kN / 2], Ring<kStages>& ring, int steps,
                                         std::uint64_t* full, A&& a, B&& b, Release&& release) {
#pragma unroll
  for (float& value : acc) value = 0;
  accumulate<kN, kA, kB, kFiller>(acc, ring, steps, full, a, b, release);
}

// Hands stages back that this consumer has no use for.
template <int kStages, class Release>
__device__ __forceinline__ void skip(Ring<kStages>& ring, int steps, std::uint64_t* full,
                                     Release&& release) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ring.advance()) {
    ptx::mbarrier_wait(&full[ring.stage], ring.parity);
    __syncwarp();  // no lane may find the barrier two phases on
    release(ring.stage);
  }
}

}  // namespace twell::cuda::sm90
