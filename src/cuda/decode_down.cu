#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 16;  // outputs of one CTA
constexpr int kStep = 16;     // neurons that a warp multiplies together
constexpr int kUnits = 16;    // of a warp that are listed at once

template <int kTokens>
struct Shared {
  union {
    std::uint16_t lists[kWarps][kUnits * kMaxDecodeUnit];
    float sums[kWarps][kTokens][kColumns];
  };
};

// list ← the neurons in use of every kWarps-th unit from `unit` on, ascending; returns how many.
// For a whole warp.
__device__ __forceinline__ int list_neurons(std::uint16_t* list, const std::uint64_t* masks,
                                            int unit, int units, int unit_neurons) {
  const int lane = threadIdx.x % 32;
  const int mine = unit + lane * kWarps;
  std::uint64_t used = lane < kUnits && mine < units ? masks[mine] : 0;
  const int own = __popcll(used);
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < kUnits; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  for (int at = sum - own; used != 0; used &= used - 1) {
    list[at++] =
        static_cast<std::uint16_t>(mine * unit_neurons + __ffsll(static_cast<long long>(used)) - 1);
  }
  __syncwarp();
  return __shfl_sync(~0u, sum, kUnits - 1);
}

// What a lane (r, q) multiplies in a step: of the neurons 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 the
// columns 2 r and 2 r + 1, each for another product of 8 columns, and the tokens 2 r and 2 r + 1 of
// each 16, which are rows r and r + 8 of the products.
template <int kTokens>
struct Fragments {
  static constexpr int kSubtiles = (kTokens + 15) / 16;  // of 16 tokens
  std::uint32_t columns[4];
  std::uint32_t tokens[kSubtiles][4];

  // list[first ..]; `down` and `h` are this lane's, the former null outside the output.
  __device__ __forceinline__ void load(const std::uint16_t* list, int first, int count,
                                       const __nv_bfloat16* down, const std::uint16_t* h,
                                       int hidden) {
    const int r = threadIdx.x % 32 / 4;
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int i = first + 2 * q + v % 2 + v / 2 * 8;
      const bool listed = i < count;
      const std::size_t neuron = listed ? list[i] : 0;
      columns[v] =
          listed && down ? *reinterpret_cast<const std::uint32_t*>(down + neuron * hidden) : 0;
#pragma unroll
      for (int m = 0; m < kSubtiles; ++m) {
        const int token = 16 * m + 2 * r;
        tokens[m][v] = listed && token < kTokens
                           ? *reinterpret_cast<const std::uint32_t*>(h + neuron * kTokens + token)
                           : 0;
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&acc)[kSubtiles][2][4]) const {
    const std::uint32_t even[2] = {ptx::low_halves(columns[0], columns[1]),
                                   ptx::low_halves(columns[2], columns[3])};
    const std::uint32_t odd[2] = {ptx::high_halves(columns[0], columns[1]),
                                  ptx::high_halves(columns[2], columns[3])};
#pragma unroll
    for (int m = 0; m < kSubtiles; ++m) {
      const auto& t = tokens[m];
      const std::uint32_t a[4] = {ptx::low_halves(t[0], t[1]), ptx::high_halves(t[0], t[1]),
                                  ptx::low_halves(t[2], t[3]), ptx::high_halves(t[2], t[3])};
      ptx::mma_16x8x16(acc[m][0], a, even);
      ptx::mma_16x8x16(acc[m][1], a, odd);
    }
  }
};

// One CTA: 16 outputs of a group of tokens, y[token, column] summed over the neurons in use. Each
// warp lists and sums over units of its own; mma.sync pairs neighbouring neurons of the list.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) down_kernel(const DecodeCall call) {
  auto& shared = *ptx::dynamic_shared<Shared<kTokens>>();
  const int group = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int r = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;
  const int column = blockIdx.x * kColumns + 2 * r;
  const auto* down =
      column < call.hidden ? static_cast<const __nv_bfloat16*>(call.down) + column : nullptr;
  const std::uint16_t* h = call.h + static_cast<std::size_t>(group) * call.neurons * kTokens;
  const std::uint64_t* masks = call.masks + group * call.units;
  std::uint16_t* list = shared.lists[warp];

  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  float acc[Fragments<kTokens>::kSubtiles][2][4] = {};
  for (int unit = warp; unit < call.units; unit += kWarps * kUnits) {
    const int count = list_neurons(list, masks, unit, call.units, call.unit_neurons);
    Fragments<kTokens> now, next;
    next.load(list, 0, count, down, h, call.hidden);
#pragma unroll 2
    for (int step = 0; step < count; step += kStep) {
      now = next;
      next.load(list, step + kStep, count, down, h, call.hidden);
      now.multiply(acc);
    }
    __syncwarp();
  }

  __syncthreads();
#pragma unroll
  for (int m = 0; m < Fragments<kTokens>::kSubtiles; ++m) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int token = 16 * m + 2 * r + v / 2;
      if (token >= kTokens) continue;
      float* out = &shared.sums[warp][token][2 * (2 * q + v % 2)];
      *reinterpret_cast<float2*>(out) = make_float2(acc[m][0][v], acc[m][1][v]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
    const int row = i / kColumns;
    const int token = group * kTokens + row;
    const int output = blockIdx.x * kColumns + i % kColumns;
    if (token >= call.tokens || output >= call.hidden) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][row][i % kColumns];
    static_cast<__nv_bfloat16*>(call.y)[static_cast<std::size_t>(token) * call.hidden + output] =
        __float2bfloat16_rn(sum);
  }
}

template <int kTokens>
Status launch_down(const DecodeCall& call, cudaStream_t stream) {
  const dim3 grid(ceil_div(call.hidden, kColumns), call.groups);
  return launch_kernel(call.overlap, down_kernel<kTokens>, grid, kThreads, sizeof(Shared<kTokens>),
                       stream, call);
}

}  // namespace

Status launch_decode_down(const DecodeCall& call, cudaStream_t stream) {
  return call.group_tokens == 8    ? launch_down<8>(call, stream)
         : call.group_tokens == 16 ? launch_down<16>(call, stream)
                                   : launch_down<32>(call, stream);
}

}  // namespace twell::cuda
