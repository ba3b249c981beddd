#include <cuda_bf16.h>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStep = 32;  // summed elements per warp and step: 16 bytes of each row per lane
constexpr int kSpan = 2 * kStep;  // of neighbouring steps of a warp: 128 bytes of each row

// Up to kTokens tokens by kNeurons neurons per CTA; kUnroll steps' loads of the weights are in
// flight together. kResident CTAs per multiprocessor hold a usual block (5632 neurons) at once.
struct FewTokens {
  static constexpr int kTokens = 8, kNeurons = 8, kUnroll = 4, kResident = 6;
};
struct ManyTokens {
  static constexpr int kTokens = 16, kNeurons = 16, kUnroll = 4, kResident = 3;
};

// Where lane (r, q) of a warp finds its 16 bytes: row r, elements 8 q to 8 q + 7 of a step. Both
// operands are permuted alike, so that the sum is over the same elements.
struct Lane {
  int row = static_cast<int>(threadIdx.x) % 32 / 4;
  int quad = static_cast<int>(threadIdx.x) % 4;
};

// sums[neuron, token] ← the dot products of 16 tokens with the rows `first` + n for the set bits n
// of `rows`; those of other rows are 0. All threads call; ends with a barrier.
template <class Config>
__device__ __forceinline__ void dot_products(float (&sums)[kWarps][Config::kNeurons][kDecodeTokens],
                                             const __nv_bfloat16* x, int tokens,
                                             const __nv_bfloat16* weight, int first,
                                             std::uint32_t rows, int hidden) {
  constexpr int kGroups = Config::kNeurons / 8;
  constexpr int kUnroll = Config::kUnroll;
  const Lane lane;
  const int warp = threadIdx.x / 32;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  float acc[kGroups][4] = {};
#pragma unroll 1
  for (int base = warp * kSpan; base < hidden; base += kUnroll / 2 * kWarps * kSpan) {
    const auto element = [&](int i) {
      return base + i / 2 * kWarps * kSpan + i % 2 * kStep + lane.quad * 8;
    };
    uint4 w[kGroups][kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int k = element(i);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int n = group * 8 + lane.row;
        w[group][i] =
            k < hidden && ((rows >> n) & 1u)
                ? ptx::load_once(weight + static_cast<std::size_t>(first + n) * hidden + k)
                : zero;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int k = element(i);
      const auto load_x = [&](int token) {
        return k < hidden && token < tokens ? *reinterpret_cast<const uint4*>(
                                                  x + static_cast<std::size_t>(token) * hidden + k)
                                            : zero;
      };
      const uint4 low = load_x(lane.row);
      const uint4 high = Config::kTokens > 8 ? load_x(lane.row + 8) : zero;
      const std::uint32_t even[4] = {low.x, high.x, low.y, high.y};
      const std::uint32_t odd[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        ptx::mma_16x8x16(acc[group], even, {w[group][i].x, w[group][i].y});
        ptx::mma_16x8x16(acc[group], odd, {w[group][i].z, w[group][i].w});
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      sums[warp][group * 8 + 2 * lane.quad + v % 2][lane.row + v / 2 * 8] = acc[group][v];
    }
  }
  __syncthreads();
}

template <int kNeurons>
__device__ __forceinline__ float total(const float (&sums)[kWarps][kNeurons][kDecodeTokens],
                                       int neuron, int token) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][neuron][token];
  return sum;
}

// Positive, or not finite: a row of x with a NaN or an infinity makes every sum non-finite, and
// must reach the later products with all its neurons.
__device__ __forceinline__ bool keeps_active(float value) {
  const int bits = __float_as_int(value);
  return bits != 0 && bits >= static_cast<int>(0xff800000u);
}

// One CTA: Config::kNeurons neurons and a group of tokens. The gate's values decide which rows of U
// it reads, so that no list is needed.
template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kResident)
    hidden_kernel(const DecodeCall call) {
  constexpr int kNeurons = Config::kNeurons;
  __shared__ float sums[2][kWarps][kNeurons][kDecodeTokens];
  __shared__ std::uint32_t in_use;
  const int first = blockIdx.x * kNeurons;
  const int group = blockIdx.y;
  const int exist = min(kNeurons, call.neurons - first);
  const int tokens = min(kDecodeTokens, call.tokens - group * kDecodeTokens);
  const auto* x = static_cast<const __nv_bfloat16*>(call.x) +
                  static_cast<std::size_t>(group) * kDecodeTokens * call.hidden;
  const auto* up = static_cast<const __nv_bfloat16*>(call.up);
  const bool gated = call.gate != nullptr;
  ptx::let_next_kernel_start();
  if (threadIdx.x == 0) in_use = 0;
  dot_products<Config>(sums[0], x, tokens,
                       gated ? static_cast<const __nv_bfloat16*>(call.gate) : up, first,
                       (1u << exist) - 1, call.hidden);

  // Threads of one half warp share a neuron.
  const int neuron = threadIdx.x / kDecodeTokens;
  const int token = threadIdx.x % kDecodeTokens;
  const bool mine = neuron < exist;
  const float gate_sum = mine ? total(sums[0], neuron, token) : 0;
  const bool active = mine && token < tokens && keeps_active(gate_sum);
  const float g = ptx::low_half(ptx::pack_relu(gate_sum, 0));
  if (active) atomicOr(&in_use, 1u << neuron);
  __syncthreads();
  const std::uint32_t rows = in_use;
  if (static_cast<int>(threadIdx.x) < exist / 8) {
    call.masks[(group * call.neurons + first) / 8 + threadIdx.x] =
        static_cast<std::uint8_t>(rows >> (8 * threadIdx.x));
  }

  float h = 0;
  if (rows != 0) {
    if (gated) dot_products<Config>(sums[1], x, tokens, up, first, rows, call.hidden);
    if (mine && ((rows >> neuron) & 1u)) {
      const std::uint32_t packed = ptx::pack(gated ? g * total(sums[1], neuron, token) : g, 0);
      h = token < tokens ? ptx::low_half(packed) : 0;
      call.h[(static_cast<std::size_t>(group) * call.neurons + first + neuron) * kDecodeTokens +
             token] = token < tokens ? static_cast<std::uint16_t>(packed) : 0;
    }
  }

  if (!call.activity) return;
  const std::uint32_t counted = __ballot_sync(~0u, active && !(g <= 0));
  if (token == 0 && mine) {
    const int count = __popc(counted >> (threadIdx.x % 32) & 0xffffu);
    if (count > 0) atomicAdd(&call.activity[first + neuron], count);
  }
  float l1 = fabsf(h);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) l1 += __shfl_xor_sync(~0u, l1, lanes);
  __shared__ float parts[kWarps];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = l1;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += parts[w];
    call.partial_l1[blockIdx.y * gridDim.x + blockIdx.x] = sum;
  }
}

constexpr int kDownColumns = 32;              // outputs of one CTA
constexpr int kDownLanes = kDownColumns / 8;  // lanes of one row
constexpr int kDownRows = 32 / kDownLanes;    // rows of a warp at a time
constexpr int kListNeurons = 4096;            // neurons listed at a time

// The neurons in use among [first, first + kListNeurons), ascending; returns how many.
__device__ __forceinline__ int list_neurons(std::uint16_t (&list)[kListNeurons],
                                            const std::uint8_t* masks, int first, int neurons) {
  constexpr int kBits = kListNeurons / kThreads;
  static_assert(kBits == 16);
  __shared__ int counts[kWarps];
  const int mine = first + static_cast<int>(threadIdx.x) * kBits;
  std::uint32_t used = 0;
  if (mine < neurons) used = masks[mine / 8];
  if (mine + 8 < neurons) used |= static_cast<std::uint32_t>(masks[mine / 8 + 1]) << 8;
  int sum = __popc(used);
  const int own = sum;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) sum += other;
  }
  if (threadIdx.x % 32 == 31) counts[threadIdx.x / 32] = sum;
  __syncthreads();
  int at = sum - own;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x / 32)) at += counts[w];
    all += counts[w];
  }
  for (; used != 0; used &= used - 1) {
    list[at++] = static_cast<std::uint16_t>(mine + __ffs(used) - 1);
  }
  __syncthreads();
  return all;
}

// The first 2 kPairs of a neuron's 16 values, which are 32-byte aligned.
template <int kPairs>
__device__ __forceinline__ void load_tokens(std::uint32_t (&pairs)[kPairs],
                                            const std::uint16_t* h) {
#pragma unroll
  for (int i = 0; i < kPairs; i += 4) {
    if constexpr (kPairs < 4) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) pairs[p] = reinterpret_cast<const std::uint32_t*>(h)[p];
    } else {
      const uint4 four = reinterpret_cast<const uint4*>(h)[i / 4];
      pairs[i] = four.x;
      pairs[i + 1] = four.y;
      pairs[i + 2] = four.z;
      pairs[i + 3] = four.w;
    }
  }
}

// One CTA: 32 outputs of a group of tokens, of which the first kTokens are in use.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) down_kernel(const DecodeCall call) {
  __shared__ std::uint16_t list[kListNeurons];
  __shared__ float sums[kWarps][kTokens][kDownColumns];
  const int group = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int column = blockIdx.x * kDownColumns + lane % kDownLanes * 8;
  const bool inside = column < call.hidden;
  const auto* down = static_cast<const __nv_bfloat16*>(call.down) + (inside ? column : 0);
  const std::uint16_t* h = call.h + static_cast<std::size_t>(group) * call.neurons * kDecodeTokens;

  ptx::wait_for_previous_kernel();
  float acc[kTokens][8] = {};
  for (int first = 0; first < call.neurons; first += kListNeurons) {
    const int count =
        list_neurons(list, call.masks + group * (call.neurons / 8), first, call.neurons);
#pragma unroll(kTokens == 1 ? 4 : 2)
    for (int i = warp * kDownRows + lane / kDownLanes; i < count; i += kWarps * kDownRows) {
      const std::size_t neuron = list[i];
      const uint4 row = ptx::load_once(down + neuron * call.hidden);
      const std::uint32_t words[4] = {row.x, row.y, row.z, row.w};
      std::uint32_t pairs[(kTokens + 1) / 2];  // of tokens
      load_tokens(pairs, h + neuron * kDecodeTokens);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float value = t % 2 == 0 ? ptx::low_half(pairs[t / 2]) : ptx::high_half(pairs[t / 2]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          acc[t][2 * w] += value * ptx::low_half(words[w]);
          acc[t][2 * w + 1] += value * ptx::high_half(words[w]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      float sum = acc[t][v];
#pragma unroll
      for (int lanes = kDownLanes; lanes < 32; lanes *= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
      }
      if (lane < kDownLanes) sums[warp][t][lane * 8 + v] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kDownColumns; i += kThreads) {
    const int token = group * kDecodeTokens + i / kDownColumns;
    const int output = blockIdx.x * kDownColumns + i % kDownColumns;
    if (token >= call.tokens || output >= call.hidden) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][i / kDownColumns][i % kDownColumns];
    static_cast<__nv_bfloat16*>(call.y)[static_cast<std::size_t>(token) * call.hidden + output] =
        __float2bfloat16_rn(sum);
  }
}

bool takes_few(const DecodeCall& call) { return call.tokens <= FewTokens::kTokens; }

dim3 hidden_grid(const DecodeCall& call) {
  const int neurons = takes_few(call) ? FewTokens::kNeurons : ManyTokens::kNeurons;
  return {static_cast<unsigned>(ceil_div(call.neurons, neurons)),
          static_cast<unsigned>(ceil_div(call.tokens, kDecodeTokens))};
}

}  // namespace

Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream) {
  const dim3 grid = hidden_grid(call);
  const auto kernel = takes_few(call) ? hidden_kernel<FewTokens> : hidden_kernel<ManyTokens>;
  return launch(kernel, grid, kThreads, 0, stream, call);
}

int decode_parts(const DecodeCall& call) {
  const dim3 grid = hidden_grid(call);
  return static_cast<int>(grid.x * grid.y);
}

Status launch_decode_down(const DecodeCall& call, cudaStream_t stream) {
  const dim3 grid(ceil_div(call.hidden, kDownColumns), ceil_div(call.tokens, kDecodeTokens));
  if (call.tokens == 1)
    return launch_kernel(call.overlap, down_kernel<1>, grid, kThreads, 0, stream, call);
  if (call.tokens <= 4)
    return launch_kernel(call.overlap, down_kernel<4>, grid, kThreads, 0, stream, call);
  return launch_kernel(call.overlap, down_kernel<kDecodeTokens>, grid, kThreads, 0, stream, call);
}

}  // namespace twell::cuda
