#include <cuda_bf16.h>

#include <algorithm>

#include "cuda/check.h"
#include "cuda/decode.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"

namespace twell::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;         // neurons that are multiplied together
constexpr int kStep = 32;         // summed elements of a step: 16 bytes of each row per lane
constexpr int kPair = 2 * kStep;  // of two steps: 128 bytes of each row
constexpr int kSteps = 4;         // of a warp in a round
constexpr int kRound = kWarps * kSteps * kStep;  // summed elements of all warps
constexpr int kTiles = kMaxDecodeUnit / kTile;

// The ring holds what each thread multiplies next: a step's pieces of the rows r and r + 8 of a
// tile. Nobody else reads them, so that no barrier is needed for them.
template <int kTokens>
struct Shared {
  static constexpr int kSlots = kTokens > 16 ? 3 : 4;  // at most kSteps
  uint4 ring[kSlots][2][kThreads];
  float sums[kWarps][kTokens / 8][kTile][8];  // [warp, token / 8, neuron, token % 8]
  std::uint16_t g[kMaxDecodeUnit][kTokens];
  std::uint32_t in_use[kTiles];
  float l1[kWarps];
};

// Where a thread stands in the products: lane (r, q) of a warp holds of rows, or tokens, r (and
// r + 8) the elements 8 q to 8 q + 7 of a step. Both operands are permuted alike, so that the sum
// is over the same elements.
struct Place {
  int warp = static_cast<int>(threadIdx.x) / 32;
  int row = static_cast<int>(threadIdx.x) % 32 / 4;
  int quad = static_cast<int>(threadIdx.x) % 4;

  // Of a step of a round, the thread's first summed element.
  __device__ __forceinline__ int element(int step) const {
    return (step / 2 * kWarps + warp) * kPair + step % 2 * kStep + quad * 8;
  }
};

// The thread's part of x in a round.
template <int kTokens>
struct TokenFragments {
  uint4 words[kSteps][kTokens / 8];

  __device__ __forceinline__ void load(const __nv_bfloat16* x, int tokens, int hidden, int first) {
    const Place place;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = first + place.element(s);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        const int token = n * 8 + place.row;
        words[s][n] =
            k < hidden && token < tokens
                ? *reinterpret_cast<const uint4*>(x + static_cast<std::size_t>(token) * hidden + k)
                : make_uint4(0, 0, 0, 0);
      }
    }
  }
};

// The products of a group of tokens with rows of a weight.
template <int kTokens>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(Shared<kTokens>& shared, const __nv_bfloat16* x, int tokens,
                                        int hidden)
      : shared_(shared), x_(x), tokens_(tokens), hidden_(hidden) {
    fragments_.load(x_, tokens_, hidden_, 0);
  }

  // For each tile of 16 of `count` rows, shared.sums ← each warp's part of their dot products with
  // the tokens; then finish(tile), between barriers. row(i): which row of `weights` the i-th is.
  template <class Row, class Finish>
  __device__ __forceinline__ void run(const __nv_bfloat16* weights, int count, const Row& row,
                                      const Finish& finish) {
    const auto copy = [&](const Source& source, int step, int slot) {
      const int k = source.first + place_.element(step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool valid = source.rows[half] >= 0 && k < hidden_;
        ptx::copy_async_16(ptx::shared_address(&shared_.ring[slot][half][threadIdx.x]),
                           weights + (valid ? source.rows[half] * hidden_ + k : 0), valid);
      }
      ptx::copy_async_commit();
    };
    Source now(*this, count, row, 0, 0);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) copy(now, s, s);
    int slot = 0;
    for (int tile = 0; tile * kTile < count; ++tile) {
      float acc[kTokens / 8][4] = {};
      for (int first = 0; first < hidden_; first += kRound) {
        const bool last = first + kRound >= hidden_;
        const Source next(*this, count, row, last ? tile + 1 : tile, last ? 0 : first + kRound);
        if (hidden_ > kRound) fragments_.load(x_, tokens_, hidden_, first);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          multiply(acc, s, slot);
          copy(s + kSlots < kSteps ? now : next, (s + kSlots) % kSteps, slot);
          slot = slot + 1 == kSlots ? 0 : slot + 1;
        }
        now = next;
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          shared_.sums[place_.warp][n][place_.row + v / 2 * 8][place_.quad * 2 + v % 2] = acc[n][v];
        }
      }
      __syncthreads();
      finish(tile);
      __syncthreads();
    }
    ptx::copy_async_wait<0>();
  }

 private:
  static constexpr int kSlots = Shared<kTokens>::kSlots;
  static_assert(kSlots <= kSteps);

  // The rows r and r + 8 of a tile, or -1, from a summed element on.
  struct Source {
    int rows[2];
    int first;

    template <class Row>
    __device__ __forceinline__ Source(const Multiplier& all, int count, const Row& row, int tile,
                                      int element)
        : first(element) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tile * kTile + half * 8 + all.place_.row;
        rows[half] = i < count ? row(i) : -1;
      }
    }
  };

  __device__ __forceinline__ void multiply(float (&acc)[kTokens / 8][4], int step, int slot) {
    ptx::copy_async_wait<kSlots - 1>();
    const uint4 low = shared_.ring[slot][0][threadIdx.x];
    const uint4 high = shared_.ring[slot][1][threadIdx.x];
    const std::uint32_t even[4] = {low.x, high.x, low.y, high.y};
    const std::uint32_t odd[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      const uint4 tokens = fragments_.words[step][n];
      ptx::mma_16x8x16(acc[n], even, {tokens.x, tokens.y});
      ptx::mma_16x8x16(acc[n], odd, {tokens.z, tokens.w});
    }
  }

  const Place place_;
  Shared<kTokens>& shared_;
  const __nv_bfloat16* x_;
  const int tokens_;
  const int hidden_;
  TokenFragments<kTokens> fragments_;
};

// Positive, or not finite: a row of x with a NaN or an infinity makes every sum non-finite, and
// must reach the later products with all its neurons.
__device__ __forceinline__ bool keeps_active(float value) {
  const int bits = __float_as_int(value);
  return bits != 0 && bits >= static_cast<int>(0xff800000u);
}

// The position of the n-th set bit, of which there are more than n.
__device__ __forceinline__ int set_bit(std::uint64_t bits, int n) {
#pragma unroll 1
  for (; n > 0; --n) bits &= bits - 1;
  return __ffsll(static_cast<long long>(bits)) - 1;
}

// One CTA: a unit of neurons and a group of tokens. The gate's values decide which rows of U it
// reads, so that no list is needed.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) hidden_kernel(const DecodeCall call) {
  auto& shared = *ptx::dynamic_shared<Shared<kTokens>>();
  const int unit = blockIdx.x;
  const int group = blockIdx.y;
  const int first = unit * call.unit_neurons;
  const int exist = min(call.unit_neurons, call.neurons - first);
  const int tokens = min(kTokens, call.tokens - group * kTokens);
  const bool gated = call.gate != nullptr;
  const std::size_t hidden = call.hidden;
  const std::size_t offset = first * hidden;  // of the unit's rows
  const auto* deciding = static_cast<const __nv_bfloat16*>(gated ? call.gate : call.up) + offset;
  const auto* up = static_cast<const __nv_bfloat16*>(call.up) + offset;
  const auto* down = static_cast<const __nv_bfloat16*>(call.down) + offset;
  const std::uint32_t row_bytes = call.hidden * 2;

  // While the previous kernel still runs, memory can be read as far as L2, where its writes arrive.
  ptx::let_next_kernel_start();
  if (threadIdx.x % 32 == 0) {
    for (int i = threadIdx.x / 32; i < min(exist, 32); i += kWarps) {
      ptx::prefetch_l2(deciding + i * hidden, row_bytes);
    }
  }
  if (threadIdx.x < kTiles) shared.in_use[threadIdx.x] = 0;
  ptx::wait_for_previous_kernel();

  // This thread's part in a tile's sums; warps take part as a whole.
  const bool sums_up = threadIdx.x < kTile * kTokens;
  const int row = static_cast<int>(threadIdx.x) % (kTile * 8) / 8;
  const int token = static_cast<int>(threadIdx.x) / (kTile * 8) * 8 + threadIdx.x % 8;
  const auto total = [&] {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][token / 8][row][token % 8];
    return sum;
  };
  // Of this thread's neuron, the tokens for which `value` holds; of the 8 that a warp shares.
  const auto vote = [&](bool value) {
    return __ballot_sync(~0u, value) >> (threadIdx.x % 32 / 8 * 8) & 0xffu;
  };

  Multiplier<kTokens> products(shared,
                               static_cast<const __nv_bfloat16*>(call.x) +
                                   static_cast<std::size_t>(group) * kTokens * hidden,
                               tokens, call.hidden);
  products.run(
      deciding, exist, [](int i) { return i; },
      [&](int tile) {
        if (!sums_up) return;
        const int neuron = tile * kTile + row;
        const float sum = total();
        const bool active = neuron < exist && token < tokens && keeps_active(sum);
        const std::uint32_t g = ptx::pack_relu(sum, 0);
        shared.g[neuron][token] = static_cast<std::uint16_t>(g);
        const std::uint32_t users = vote(active);
        const std::uint32_t counted = vote(active && !(ptx::low_half(g) <= 0));
        if (users == 0 || threadIdx.x % 8 != 0) return;
        atomicOr(&shared.in_use[tile], 1u << row);
        if (gated) ptx::prefetch_l2(up + neuron * hidden, row_bytes);
        ptx::prefetch_l2(down + neuron * hidden, row_bytes);
        if (call.activity && counted != 0) {
          atomicAdd(&call.activity[first + neuron], __popc(counted));
        }
      });

  std::uint64_t rows = 0;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    rows |= static_cast<std::uint64_t>(shared.in_use[t]) << (t * kTile);
  }
  const int count = __popcll(rows);
  const int part = group * call.units + unit;
  if (threadIdx.x == 0) call.masks[part] = rows;

  float l1 = 0;
  const auto store = [&](int i, float u) {  // of the i-th row in use
    const int neuron = set_bit(rows, i);
    const float g = ptx::low_half(shared.g[neuron][token]);
    const std::uint32_t packed = token < tokens ? ptx::pack(g * u, 0) : 0;
    call.h[(static_cast<std::size_t>(group) * call.neurons + first + neuron) * kTokens + token] =
        static_cast<std::uint16_t>(packed);
    l1 += fabsf(ptx::low_half(packed));
  };
  if (gated) {
    products.run(
        up, count, [&](int i) { return set_bit(rows, i); },
        [&](int tile) {
          if (sums_up && tile * kTile + row < count) store(tile * kTile + row, total());
        });
  } else if (sums_up) {
    for (int i = row; i < count; i += kTile) store(i, 1);
  }

  if (!call.activity) return;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) l1 += __shfl_xor_sync(~0u, l1, lanes);
  if (threadIdx.x % 32 == 0) shared.l1[threadIdx.x / 32] = l1;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.l1[w];
    call.partial_l1[part] = sum;
  }
}

template <int kTokens>
Status launch_hidden(const DecodeCall& call, cudaStream_t stream) {
  const dim3 grid(call.units, call.groups);
  const std::size_t shared_bytes = std::max(sizeof(Shared<kTokens>), call.hidden_shared);
  // Before it there may be a memset of the counts, which it cannot overlap.
  return launch_kernel(call.overlap && !call.activity, hidden_kernel<kTokens>, grid, kThreads,
                       shared_bytes, stream, call);
}

}  // namespace

Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream) {
  return call.group_tokens == 8    ? launch_hidden<8>(call, stream)
         : call.group_tokens == 16 ? launch_hidden<16>(call, stream)
                                   : launch_hidden<32>(call, stream);
}

}  // namespace twell::cuda
