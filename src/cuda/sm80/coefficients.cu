// What the gradients are made of, over the unions of a chunk: g and u (of x; made anew where the
// forward could not keep them) and dh (of dy), for 128 tokens and 64 union neurons at a time, and
// from them dg, du and h. g and u are rounded to bf16, u as on the CPU and in PyTorch.

#include "cuda/check.h"
#include "cuda/coefficients.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

constexpr int kGroups = kUnionStep / kWarpsPerHalf / 8;

// A thread's values as columns hold them, in the order of Sums<kUnionStep>.
using Words = std::uint32_t[kSubtiles][kGroups][2];

struct Weights {
  const __nv_bfloat16* gate;  // of the projection that decides: U for a plain block
  const __nv_bfloat16* up;
  const __nv_bfloat16* down;
};

// Sums to columns, by pack(token's, that of the token 8 further on).
template <class Pack>
__device__ __forceinline__ void to_words(Words& words, const Sums<kUnionStep>& sums,
                                         const Pack& pack) {
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        words[i][j][parity] = pack(sums[i][j][parity], sums[i][j][2 + parity]);
      }
    }
  }
}

// From columns, of which a thread's first word is at `first`.
__device__ __forceinline__ void load_words(Words& words, const std::uint32_t* first) {
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        words[i][j][parity] = first[(8 * j + parity) * kColumnWords + 8 * i];
      }
    }
  }
}

// Positions [first, first + 64) of a tile's union, of which some may be padding.
template <bool kGated>
__device__ __forceinline__ void make_coefficients(const BackwardChunk& chunk,
                                                  const Weights& weights, float grad_l1, int tile,
                                                  int first) {
  const ForwardChunk& forward = chunk.forward;
  const UnionEntry* entries =
      forward.unions + static_cast<std::size_t>(tile) * forward.capacity + first;
  Sums<kUnionStep> sums;
  const auto product = [&](const void* rows, const __nv_bfloat16* matrix) {
    InnerSource<kTileTokens> tokens =
        tokens_of(forward, static_cast<const __nv_bfloat16*>(rows), tile);
    InnerSource<kUnionStep> neurons(
        matrix, forward.hidden, [&](int position) -> const __nv_bfloat16* {
          const UnionEntry entry = entries[position];
          if (!entry.in_use()) return nullptr;
          return matrix + static_cast<std::size_t>(entry.row()) * forward.hidden;
        });
    multiply<kUnionStep, Major::kInner>(sums, ceil_div(forward.hidden, kStep), tokens, neurons);
  };
  const int warp = threadIdx.x / 32;
  const int half = warp / kWarpsPerHalf;
  const int mine = warp % kWarpsPerHalf * (kGroups * 8) + threadIdx.x % 4 * 2;
  const int row = threadIdx.x % 32 / 4;

  Words g, u;
  if (const int place = forward.kept_place(tile); place >= 0) {
    const std::int64_t column = forward.kept_base(place, tile, half) + first + mine;
    load_words(g, chunk.saved_g + column * kColumnWords + row);
    if constexpr (kGated) load_words(u, chunk.saved_u + column * kColumnWords + row);
  } else {
    product(chunk.x, weights.gate);
    to_words(g, sums, ptx::pack_relu);
    if constexpr (kGated) {
      product(chunk.x, weights.up);
      to_words(u, sums, ptx::pack);
    }
  }
  product(chunk.dy, weights.down);

  const std::int64_t base = forward.halves[2 * tile + half].base;
  const std::int64_t place = (base + first) * kColumnWords + row;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int position = mine + 8 * j + parity;
      const UnionEntry entry = entries[position];
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        // As in the forward, a neuron that the half does not use has g = 0 for its tokens.
        const auto own = Coefficients::make<kGated>(
            entry.in_half(half) ? g[i][j][parity] : 0, kGated ? u[i][j][parity] : 0,
            sums[i][j][parity], sums[i][j][2 + parity], grad_l1);
        const std::int64_t at = place + position * kColumnWords + 8 * i;
        const bool in_use = entry.in_use();  // padding is no 0 · inf
        chunk.dg[at] = in_use ? own.dg : 0;
        if constexpr (kGated) chunk.du[at] = in_use ? own.du : 0;
        chunk.h[at] = in_use ? own.h : 0;
      }
    }
  }
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads, kResident)
    coefficients_kernel(const BackwardChunk chunk, const Weights weights) {
  const Schedule& schedule = *chunk.forward.schedule;
  const float grad_l1 = chunk.grad_l1 ? *chunk.grad_l1 : 0;
#pragma unroll 1
  for (int i = blockIdx.x; i < schedule.item_count; i += gridDim.x) {
    const UnionItem item = schedule.items[i];
    const int first = item.first_position();
#pragma unroll 1
    for (int step = 0; step < item.steps(); ++step) {
      make_coefficients<kGated>(chunk, weights, grad_l1, item.tile(), first + step * kUnionStep);
    }
  }
}

}  // namespace

Status launch_coefficients(const BackwardChunk& chunk, const TokenLists&, const FfnWeights& weights,
                           int multiprocessors, cudaStream_t stream) {
  const bool gated = weights.gate != nullptr;
  const auto* up = static_cast<const __nv_bfloat16*>(weights.up);
  const Weights own = {gated ? static_cast<const __nv_bfloat16*>(weights.gate) : up, up,
                       static_cast<const __nv_bfloat16*>(weights.down)};
  return launch(gated ? coefficients_kernel<true> : coefficients_kernel<false>,
                kResident * multiprocessors, kThreads, kSharedBytes, stream, chunk, own);
}

}  // namespace twell::cuda::sm80
