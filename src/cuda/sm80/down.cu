// The down projection over the unions of a chunk: y = h D for 128 tokens and 128 outputs at a time,
// summed over the tile's union. The rows of D are gathered; both operands lie with the summed
// dimension outside and are transposed on the way from shared memory to the tensor cores.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/quad.cuh"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

// The two halves' columns of h, by union position; pieces 0 to 7 are of the first half.
struct HiddenRows {
  using Row = int;
  const __nv_bfloat16* matrix;  // of the tile
  int capacity;

  __device__ Row row(int position) const { return position; }
  __device__ const __nv_bfloat16* address(Row position, int piece) const {
    constexpr int kPieces = kHalfTokens / 8;
    const std::size_t column =
        static_cast<std::size_t>(piece / kPieces) * capacity + static_cast<std::size_t>(position);
    return matrix + column * kHalfTokens + piece % kPieces * 8;
  }
};

// The rows of D of the neurons of a union.
struct GatheredRows {
  using Row = UnionEntry;
  const __nv_bfloat16* matrix;  // from the strip's first output on
  const UnionEntry* entries;
  int padded;   // entries
  int outputs;  // of the strip and all after it
  int hidden;

  __device__ Row row(int position) const {
    return position < padded ? entries[position] : UnionEntry{0, 0};
  }
  __device__ const __nv_bfloat16* address(Row entry, int piece) const {
    if (!entry.in_use() || piece * 8 >= outputs) return nullptr;
    return matrix + static_cast<std::size_t>(entry.row()) * hidden + piece * 8;
  }
};

__global__ void __launch_bounds__(kThreads, kResident)
    down_kernel(const ForwardChunk chunk, const __nv_bfloat16* __restrict__ down,
                __nv_bfloat16* __restrict__ y, int strips) {
  const int tile = chunk.order[blockIdx.x / strips];
  const int first = blockIdx.x % strips * kColumns;  // output
  const int padded = ceil_div(chunk.counts[tile], kUnionStep) * kUnionStep;
  const HiddenRows hidden_rows = {
      reinterpret_cast<const __nv_bfloat16*>(chunk.h + static_cast<std::size_t>(2 * tile) *
                                                           chunk.capacity * kColumnWords),
      chunk.capacity};
  const GatheredRows down_rows = {down + first,
                                  chunk.unions + static_cast<std::size_t>(tile) * chunk.capacity,
                                  padded, chunk.hidden - first, chunk.hidden};
  OuterSource<HiddenRows> tokens(hidden_rows);
  OuterSource<GatheredRows> outputs(down_rows);
  Sums<kColumns> sums;
  multiply<kColumns, Major::kOuter>(sums, padded / kStep, tokens, outputs);

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

}  // namespace

Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int, cudaStream_t stream) {
  const int strips = ceil_div(chunk.hidden, kColumns);
  return launch(down_kernel, chunk.tiles * strips, kThreads, kSharedBytes, stream, chunk,
                static_cast<const __nv_bfloat16*>(down), static_cast<__nv_bfloat16*>(y), strips);
}

}  // namespace twell::cuda::sm80
