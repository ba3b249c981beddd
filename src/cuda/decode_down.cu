#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 32;           // outputs of one CTA
constexpr int kWords = kColumns / 16;  // of a row, per lane: 4 columns
constexpr int kStep = 16;              // neurons that a warp multiplies together

template <int kTokens>
struct Shared {
  union {
    std::uint16_t list[kThreads * kMaxDecodeUnit];
    float sums[kWarps][kTokens][kColumns];
  };
  int counts[kWarps];
};

// The neurons in use of the units from `unit` on, one for each thread, ascending; returns how many.
__device__ __forceinline__ int list_neurons(std::uint16_t* list, int (&counts)[kWarps],
                                            const std::uint64_t* masks, int unit, int units,
                                            int unit_neurons) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int mine = unit + static_cast<int>(threadIdx.x);
  std::uint64_t used = mine < units ? masks[mine] : 0;
  const int own = __popcll(used);
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) counts[warp] = sum;
  __syncthreads();
  int at = sum - own;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) at += counts[w];
    all += counts[w];
  }
  for (; used != 0; used &= used - 1) {
    list[at++] =
        static_cast<std::uint16_t>(mine * unit_neurons + __ffsll(static_cast<long long>(used)) - 1);
  }
  __syncthreads();
  return all;
}

// One CTA: 32 outputs of a group of tokens, y[token, column] summed over the neurons in use by
// mma.sync, which pairs neighbouring neurons of the list. Lane (r, q) of a warp loads of neurons 2
// q, 2 q + 1, 2 q + 8 and 2 q + 9 of a step the columns 4 r to 4 r + 3, each for another product of
// 8 columns, and the tokens 2 r and 2 r + 1 of each 16, which are rows r and r + 8 of the products.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) down_kernel(const DecodeCall call) {
  constexpr int kSubtiles = (kTokens + 15) / 16;  // of 16 tokens
  auto& shared = *ptx::dynamic_shared<Shared<kTokens>>();
  const int group = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int r = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;
  const int column = blockIdx.x * kColumns + 2 * kWords * r;
  const bool inside = column < call.hidden;
  const auto* down = static_cast<const __nv_bfloat16*>(call.down) + (inside ? column : 0);
  const std::uint16_t* h = call.h + static_cast<std::size_t>(group) * call.neurons * kTokens;

  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  float acc[kSubtiles][2 * kWords][4] = {};
  for (int unit = 0; unit < call.units; unit += kThreads) {
    const int count = list_neurons(shared.list, shared.counts, call.masks + group * call.units,
                                   unit, call.units, call.unit_neurons);
#pragma unroll 2
    for (int step = warp * kStep; step < count; step += kWarps * kStep) {
      uint2 d[4];
      std::uint32_t tokens[kSubtiles][4];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int i = step + 2 * q + v % 2 + v / 2 * 8;
        const bool listed = i < count;
        const std::size_t neuron = listed ? shared.list[i] : 0;
        d[v] = listed && inside ? *reinterpret_cast<const uint2*>(down + neuron * call.hidden)
                                : make_uint2(0, 0);
#pragma unroll
        for (int m = 0; m < kSubtiles; ++m) {
          const int token = 16 * m + 2 * r;
          tokens[m][v] = listed && token < kTokens
                             ? *reinterpret_cast<const std::uint32_t*>(h + neuron * kTokens + token)
                             : 0;
        }
      }
      const std::uint32_t words[4][kWords] = {
          {d[0].x, d[0].y}, {d[1].x, d[1].y}, {d[2].x, d[2].y}, {d[3].x, d[3].y}};
#pragma unroll
      for (int m = 0; m < kSubtiles; ++m) {
        const auto& t = tokens[m];
        const std::uint32_t a[4] = {ptx::low_halves(t[0], t[1]), ptx::high_halves(t[0], t[1]),
                                    ptx::low_halves(t[2], t[3]), ptx::high_halves(t[2], t[3])};
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          ptx::mma_16x8x16(acc[m][2 * w], a,
                           {ptx::low_halves(words[0][w], words[1][w]),
                            ptx::low_halves(words[2][w], words[3][w])});
          ptx::mma_16x8x16(acc[m][2 * w + 1], a,
                           {ptx::high_halves(words[0][w], words[1][w]),
                            ptx::high_halves(words[2][w], words[3][w])});
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < kSubtiles; ++m) {
#pragma unroll
    for (int j = 0; j < 2 * kWords; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int token = 16 * m + 2 * r + v / 2;
        if (token < kTokens) {
          shared.sums[warp][token][2 * kWords * (2 * q + v % 2) + j] = acc[m][j][v];
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
    const int token = group * kTokens + i / kColumns;
    const int output = blockIdx.x * kColumns + i % kColumns;
    if (token >= call.tokens || output >= call.hidden) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][i / kColumns][i % kColumns];
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
