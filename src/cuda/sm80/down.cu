// Products over the unions of a round, for 128 tokens and 128 outputs at a time: y = h D, and the
// gated block's dx = dg G + du U, two such sums in one. The rows of the weights are gathered; both
// operands lie with the summed dimension outside and are transposed on the way from shared memory
// to the tensor cores.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/quad.cuh"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

// y = Σ over pairs of h D.
template <int kPairs>
struct Operands {
  const std::uint32_t* h[kPairs];     // columns by union position
  const __nv_bfloat16* down[kPairs];  // [neurons, hidden]
};

// Summed elements [pair, union position] in a row: of which pair the i-th is.
template <int kPairs>
__device__ __forceinline__ int pair_of(int i, int padded) {
  return kPairs == 1 ? 0 : i >= padded;
}

// The two halves' columns of h; pieces 0 to 7 are of the first half.
template <int kPairs>
struct HiddenRows {
  struct Row {
    int pair;
    int position;
  };
  const __nv_bfloat16* matrices[kPairs];  // of the tile
  const __nv_bfloat16* matrix;            // any of them
  int padded;

  __device__ HiddenRows(const ForwardChunk& chunk, const Operands<kPairs>& operands, int tile,
                        int positions)
      : padded(positions) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      matrices[p] = reinterpret_cast<const __nv_bfloat16*>(
          operands.h[p] + std::int64_t{chunk.halves[2 * tile].base} * kColumnWords);
    }
    matrix = matrices[0];
  }
  __device__ Row row(int i) const {
    const int pair = pair_of<kPairs>(i, padded);
    return {pair, i - pair * padded};
  }
  __device__ const __nv_bfloat16* address(Row row, int piece) const {
    constexpr int kPieces = kHalfTokens / 8;
    const auto column = static_cast<std::size_t>(piece / kPieces * padded + row.position);
    return (row.pair == 0 ? matrices[0] : matrices[kPairs - 1]) + column * kHalfTokens +
           piece % kPieces * 8;
  }
};

// The rows of D of the neurons of a union.
template <int kPairs>
struct GatheredRows {
  struct Row {
    int pair;
    UnionEntry entry;
  };
  const __nv_bfloat16* matrices[kPairs];  // from the strip's first output on
  const __nv_bfloat16* matrix;            // any of them
  const UnionEntry* entries;
  int padded;   // entries
  int outputs;  // of the strip and all after it
  int hidden;

  __device__ GatheredRows(const ForwardChunk& chunk, const Operands<kPairs>& operands, int tile,
                          int positions, int first)
      : entries(chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity),
        padded(positions),
        outputs(chunk.hidden - first),
        hidden(chunk.hidden) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) matrices[p] = operands.down[p] + first;
    matrix = matrices[0];
  }
  __device__ Row row(int i) const {
    const int pair = pair_of<kPairs>(i, padded);
    const int position = i - pair * padded;
    return {pair, position < padded ? entries[position] : UnionEntry{0, 0}};
  }
  __device__ const __nv_bfloat16* address(Row row, int piece) const {
    if (!row.entry.in_use() || piece * 8 >= outputs) return nullptr;
    return (row.pair == 0 ? matrices[0] : matrices[kPairs - 1]) +
           static_cast<std::size_t>(row.entry.row()) * hidden + piece * 8;
  }
};

template <int kPairs>
__global__ void __launch_bounds__(kThreads, kResident)
    down_kernel(const ForwardChunk chunk, const Operands<kPairs> operands,
                __nv_bfloat16* __restrict__ y, int strips) {
  const Schedule& round = *chunk.schedule;
  const int rank = static_cast<int>(blockIdx.x) / strips;
  if (rank >= round.tiles) return;
  const int tile = chunk.order[round.first_tile + rank];
  const int first = blockIdx.x % strips * kColumns;  // output
  const int padded = ceil_div(chunk.counts[tile], kUnionStep) * kUnionStep;
  const HiddenRows<kPairs> hidden_rows(chunk, operands, tile, padded);
  const GatheredRows<kPairs> down_rows(chunk, operands, tile, padded, first);
  OuterSource<HiddenRows<kPairs>> tokens(hidden_rows);
  OuterSource<GatheredRows<kPairs>> outputs(down_rows);
  Sums<kColumns> sums;
  multiply<kColumns, Major::kOuter>(sums, kPairs * padded / kStep, tokens, outputs);

  // Row l of 16 is token l / 2 + 8 (l % 2): see the columns in forward.h.
  const int warp = threadIdx.x / 32;
  const int row = threadIdx.x % 32 / 4;
  const int quad = threadIdx.x % 4;
  const int output = first + warp % kWarpsPerHalf * 32 + quad * 8;
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int token = tile * kTileTokens + warp / kWarpsPerHalf * kHalfTokens + i * 16 +
                        (row + 8 * s) / 2 + row % 2 * 8;
      const auto pair = [&](int j) { return ptx::pack(sums[i][j][2 * s], sums[i][j][2 * s + 1]); };
      const uint4 words = transpose_in_quad(make_uint4(pair(0), pair(1), pair(2), pair(3)), quad);
      if (token < chunk.tokens && output < chunk.hidden) {
        *reinterpret_cast<uint4*>(y + static_cast<std::size_t>(token) * chunk.hidden + output) =
            words;
      }
    }
  }
}

template <int kPairs>
Status launch_pairs(const ForwardChunk& chunk, const Operands<kPairs>& operands, void* y,
                    cudaStream_t stream) {
  const int strips = ceil_div(chunk.hidden, kColumns);
  return launch(down_kernel<kPairs>, chunk.tiles * strips, kThreads, kSharedBytes, stream, chunk,
                operands, static_cast<__nv_bfloat16*>(y), strips);
}

}  // namespace

Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int, cudaStream_t stream) {
  const Operands<1> operands = {{chunk.h}, {static_cast<const __nv_bfloat16*>(down)}};
  return launch_pairs(chunk, operands, y, stream);
}

Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx, int,
                             cudaStream_t stream) {
  const auto* gate = static_cast<const __nv_bfloat16*>(weights.gate);
  const auto* up = static_cast<const __nv_bfloat16*>(weights.up);
  if (!gate) return launch_pairs(chunk.forward, Operands<1>{{chunk.dg}, {up}}, dx, stream);
  const Operands<2> operands = {{chunk.dg, chunk.du}, {gate, up}};
  return launch_pairs(chunk.forward, operands, dx, stream);
}

}  // namespace twell::cuda::sm80
