// The up projection over the unions of a chunk: h = columns ⊙ (x Uᵀ), and what is kept of both
// factors for the backward, for 128 tokens and 128 or 64 union neurons at a time, whose rows of U
// are gathered.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

// Positions [first, first + kN) of a tile's union, of which some may be padding.
template <int kN>
__device__ __forceinline__ void make_h(const ForwardChunk& chunk, const __nv_bfloat16* x,
                                       const __nv_bfloat16* up, int tile, int first) {
  const UnionEntry* entries =
      chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity + first;
  InnerSource<kTileTokens> tokens = tokens_of(chunk, x, tile);
  InnerSource<kN> neurons(up, chunk.hidden, [&](int position) -> const __nv_bfloat16* {
    const UnionEntry entry = entries[position];
    if (!entry.in_use()) return nullptr;
    return up + static_cast<std::size_t>(entry.row()) * chunk.hidden;
  });
  Sums<kN> sums;
  multiply<kN, Major::kInner>(sums, ceil_div(chunk.hidden, kStep), tokens, neurons);

  constexpr int kGroups = kN / kWarpsPerHalf / 8;
  const int warp = threadIdx.x / 32;
  const int half = warp / kWarpsPerHalf;
  const int row = threadIdx.x % 32 / 4;
  const int mine = warp % kWarpsPerHalf * (kGroups * 8) + threadIdx.x % 4 * 2;
  const std::size_t half_tile = 2 * tile + half;
  const std::uint32_t* columns =
      chunk.columns + half_tile * chunk.blocks * kBlockNeurons * kColumnWords + row;
  const std::int64_t base = chunk.halves[half_tile].base;
  std::uint32_t* h = chunk.h + (base + first) * kColumnWords + row;
  const std::int64_t place = chunk.kept_base(chunk.place(tile), tile, half);
  const std::int64_t saved = (place + first) * kColumnWords + row;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const int position = mine + 8 * j + parity;
      const UnionEntry entry = entries[position];
      const std::uint32_t* g = columns + entry.source(half) * kColumnWords;
      const int at = position * kColumnWords;
#pragma unroll
      for (int i = 0; i < kSubtiles; ++i) {
        const std::uint32_t pair = entry.in_half(half) ? g[8 * i] : 0;
        const std::uint32_t value = ptx::pack(ptx::low_half(pair) * sums[i][j][parity],
                                              ptx::high_half(pair) * sums[i][j][2 + parity]);
        h[at + 8 * i] = entry.in_use() ? value : 0;  // padding is no 0 · inf
        if (place >= 0) {
          chunk.saved.g[saved + at + 8 * i] = pair;
          chunk.saved.u[saved + at + 8 * i] = ptx::pack(sums[i][j][parity], sums[i][j][2 + parity]);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    up_kernel(const ForwardChunk chunk, const __nv_bfloat16* __restrict__ x,
              const __nv_bfloat16* __restrict__ up) {
  const int items = chunk.schedule->item_count;
#pragma unroll 1
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const UnionItem item = chunk.schedule->items[i];
    int first = item.first_position();
    const int end = first + item.steps() * kUnionStep;
#pragma unroll 1
    for (; first + kColumns <= end; first += kColumns) {
      make_h<kColumns>(chunk, x, up, item.tile(), first);
    }
    if (first < end) make_h<kUnionStep>(chunk, x, up, item.tile(), first);
  }
}

}  // namespace

Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream) {
  return launch(up_kernel, kResident * multiprocessors, kThreads, kSharedBytes, stream, chunk,
                rows_of(chunk, x), static_cast<const __nv_bfloat16*>(up));
}

}  // namespace twell::cuda::sm80
