// Counts of a forward pass: active pairs, Σ |h|, active tokens of each neuron. Floating-point
// sums run in a fixed order; only integers are added atomically.

#include "cuda/check.h"
#include "cuda/forward.h"
#include "cuda/ptx/convert.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// The sum over the block, valid in thread 0.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T sums[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(threadIdx.x < kWarps ? sums[threadIdx.x] : T{});
}

// How many of a word's two tokens, 8 apart, exist and are positive or NaN, which keeps a neuron
// active. (A NaN in a weight reaches the tokens beyond the last one too.)
__device__ __forceinline__ int count_active(std::uint32_t g, int token, int tokens) {
  return (token < tokens && !(ptx::low_half(g) <= 0)) +
         (token + 8 < tokens && !(ptx::high_half(g) <= 0));
}

// kStatsParts CTAs per tile, one warp per union position, one lane per word of a column.
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const ForwardChunk chunk, std::int32_t* activity, float* partial_l1) {
  const int part = blockIdx.x;
  const int tile = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int count = chunk.counts[tile];
  const UnionEntry* entries = chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity;
  float l1 = 0;
  constexpr int kStride = kStatsParts * kWarps;
  constexpr int kBatch = 4;  // positions whose loads are in flight together
  for (int first = part * kWarps + threadIdx.x / 32; first < count; first += kBatch * kStride) {
    UnionEntry entry[kBatch];
    std::uint32_t g[kBatch][2], h[kBatch][2];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kStride;
      entry[b] = i < count ? entries[i] : UnionEntry{};
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool used = entry[b].in_half(half);
        const std::size_t half_tile = 2 * tile + half;
        const std::size_t source = half_tile * chunk.blocks * kBlockNeurons + entry[b].source(half);
        const std::int64_t position = chunk.halves[half_tile].base + first + b * kStride;
        g[b][half] = used ? chunk.columns[source * kColumnWords + lane] : 0;
        h[b][half] = used ? chunk.h[position * kColumnWords + lane] : 0;
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int active = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = (2 * tile + half) * kHalfTokens + lane / 8 * 16 + lane % 8;
        active += count_active(g[b][half], token, chunk.tokens);
        l1 += fabsf(ptx::low_half(h[b][half])) + fabsf(ptx::high_half(h[b][half]));
      }
      active = __reduce_add_sync(~0u, active);
      if (lane == 0 && active > 0) atomicAdd(&activity[entry[b].row()], active);
    }
  }
  l1 = block_sum(l1);
  if (threadIdx.x == 0) partial_l1[tile * kStatsParts + part] = l1;
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const std::int32_t* activity, int neurons, const float* partial_l1,
                 std::int64_t parts, std::int64_t* l0, float* l1) {
  long long pairs = 0;
  for (int n = threadIdx.x; n < neurons; n += kThreads) pairs += activity[n];
  double sum = 0;
  for (std::int64_t part = threadIdx.x; part < parts; part += kThreads) sum += partial_l1[part];
  pairs = block_sum(pairs);
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (l0) *l0 = pairs;
  if (l1) *l1 = static_cast<float>(sum);
}

}  // namespace

Status launch_stats(const ForwardChunk& chunk, std::int32_t* activity, float* partial_l1,
                    cudaStream_t stream) {
  return launch(stats_kernel, dim3(kStatsParts, chunk.tiles), kThreads, 0, stream, chunk, activity,
                partial_l1);
}

Status launch_stats_total(const std::int32_t* activity, int neurons, const float* partial_l1,
                          std::int64_t parts, std::int64_t* l0, float* l1, cudaStream_t stream) {
  return launch(total_kernel, 1, kThreads, 0, stream, activity, neurons, partial_l1, parts, l0, l1);
}

}  // namespace twell::cuda
