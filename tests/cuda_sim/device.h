#pragma once
// What nvcc gives a .cu file before its first line, for the simulator: keywords, built-in variables
// and functions of device code, launches. Included on the compiler's command line.

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "simulator.h"

#undef __host__
#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// Static shared memory: blocks run one after the other, and the section is poisoned between them.
#define __shared__ static __attribute__((section("cuda_sim_shared")))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline int __popc(std::uint32_t bits) { return std::popcount(bits); }
inline int __popcll(std::uint64_t bits) { return std::popcount(bits); }
inline int __ffsll(std::uint64_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline int __ffs(std::uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline float __uint_as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }

template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
inline void __threadfence() {}

template <class T>
T atomicAdd(T* pointer, std::type_identity_t<T> value) {
  const T old = *pointer;
  *pointer += value;
  return old;
}
template <class T>
T atomicOr(T* pointer, std::type_identity_t<T> value) {
  const T old = *pointer;
  *pointer |= value;
  return old;
}

inline void __syncthreads() { cuda_sim::sync_block(); }
inline void __syncwarp() {
  int nothing = 0;
  cuda_sim::collective("__syncwarp", nothing, [](int* const*) {});
}

namespace cuda_sim {

inline void require_full_mask(std::uint32_t mask) {
  if (mask != ~0u) fault("a warp operation for some lanes only, which is not simulated");
}

// Every lane's value from lane source(lane).
template <class T, class Source>
T shuffle(const char* name, std::uint32_t mask, T value, Source&& source) {
  struct Slot {
    T value, result;
    int from;
  };
  require_full_mask(mask);
  Slot slot = {value, value, source(static_cast<int>(threadIdx.x) % kWarpLanes)};
  collective(name, slot, [](Slot* const* lanes) {
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      lanes[lane]->result = lanes[lanes[lane]->from]->value;
    }
  });
  return slot.result;
}

}  // namespace cuda_sim

template <class T>
T __shfl_sync(std::uint32_t mask, T value, int from) {
  return cuda_sim::shuffle("__shfl_sync", mask, value, [=](int) { return from % 32; });
}
template <class T>
T __shfl_up_sync(std::uint32_t mask, T value, int distance, int width = 32) {
  return cuda_sim::shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    return lane % width >= distance ? lane - distance : lane;
  });
}
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lanes) {
  return cuda_sim::shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ lanes; });
}
inline std::uint32_t __reduce_or_sync(std::uint32_t mask, std::uint32_t value) {
  cuda_sim::require_full_mask(mask);
  cuda_sim::collective("__reduce_or_sync", value, [](std::uint32_t* const* lanes) {
    std::uint32_t all = 0;
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) all |= *lanes[lane];
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) *lanes[lane] = all;
  });
  return value;
}
inline int __reduce_add_sync(std::uint32_t mask, int value) {
  cuda_sim::require_full_mask(mask);
  cuda_sim::collective("__reduce_add_sync", value, [](int* const* lanes) {
    int sum = 0;
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) sum += *lanes[lane];
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) *lanes[lane] = sum;
  });
  return value;
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, bool value) {
  return __reduce_or_sync(mask, value ? 1u << (threadIdx.x % 32) : 0);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->dynamicSmemBytes > cuda_sim::shared_limit(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  return cuda_sim::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                       [&] { kernel(Parameters(arguments)...); });
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return cuda_sim::limit_shared(reinterpret_cast<const void*>(kernel),
                                static_cast<std::size_t>(bytes));
}
