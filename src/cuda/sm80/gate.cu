// The gate projection of a chunk: a CTA multiplies a tile of tokens by a block of 256 neurons, half
// a block at a time, and keeps only the columns that some token of a half tile uses.

#include "cuda/check.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/sm80/product.cuh"
#include "cuda/sm80/products.h"

namespace twell::cuda::sm80 {
namespace {

constexpr int kParts = kBlockNeurons / kColumns;
constexpr int kBand = 16;  // tiles down the tokens before the next block of neurons
constexpr int kWordNeurons = 32;
static_assert(kColumns == kWarpsPerHalf * kWordNeurons, "a warp owns one word of the mask");

// The piece of work `item`: bands of tiles go over all blocks of neurons in turn, so that both
// operands are read again from L2.
struct Piece {
  int tile;
  int block;

  __device__ Piece(int item, const ForwardChunk& chunk) {
    const int band = item / (kBand * chunk.blocks);
    const int height = min(kBand, chunk.tiles - band * kBand);
    const int rest = item - band * kBand * chunk.blocks;
    block = rest / height;
    tile = band * kBand + rest - block * height;
  }
};

// A row of x with a NaN or an infinity makes every sum of its row non-finite, and must reach the
// later products with all its neurons.
__device__ __forceinline__ bool is_finite(float value) {
  return fabsf(value) < __int_as_float(0x7f800000);
}

// The warp's 32 columns of which any of its 64 tokens makes use.
__device__ __forceinline__ std::uint32_t columns_in_use(const Sums<kColumns>& sums) {
  const int quad = threadIdx.x % 4;
  std::uint32_t used = 0;
#pragma unroll
  for (int i = 0; i < kSubtiles; ++i) {
    if (!is_finite(sums[i][0][0]) || !is_finite(sums[i][0][2])) used = ~0u;
#pragma unroll
    for (int j = 0; j < kWordNeurons / 8; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        // Not <=: a NaN counts as active.
        if (!(ptx::max_nan(sums[i][j][parity], sums[i][j][2 + parity]) <= 0)) {
          used |= 1u << (8 * j + 2 * quad + parity);
        }
      }
    }
  }
  return __reduce_or_sync(~0u, used);
}

__global__ void __launch_bounds__(kThreads, kResident)
    gate_kernel(const ForwardChunk chunk, const __nv_bfloat16* __restrict__ x,
                const __nv_bfloat16* __restrict__ gate) {
  __shared__ std::uint32_t masks[2][kMaskWords];  // of both halves
  const Piece piece(blockIdx.x, chunk);
  const int half = threadIdx.x / 32 / kWarpsPerHalf;
  const int row = threadIdx.x % 32 / 4;
  const int quad = threadIdx.x % 4;
  const std::size_t place =
      static_cast<std::size_t>(2 * piece.tile + half) * chunk.blocks + piece.block;
  std::uint32_t* out = chunk.columns + place * kBlockNeurons * kColumnWords + row;
  if (blockIdx.x == 0 && threadIdx.x == 0) chunk.schedule->finished = 0;

  int stored = 0;  // columns of the parts before
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int first = piece.block * kBlockNeurons + part * kColumns;
    const int exist = chunk.neurons - first;
    InnerSource<kTileTokens> tokens = tokens_of(chunk, x, piece.tile);
    InnerSource<kColumns> neurons(gate, chunk.hidden, [&](int n) -> const __nv_bfloat16* {
      return n < exist ? gate + static_cast<std::size_t>(first + n) * chunk.hidden : nullptr;
    });
    Sums<kColumns> sums;
    multiply<kColumns, Major::kInner>(sums, exist > 0 ? ceil_div(chunk.hidden, kStep) : 0, tokens,
                                      neurons);

    const int in_half = threadIdx.x / 32 % kWarpsPerHalf;
    const int word = part * kWarpsPerHalf + in_half;
    const int bits = exist - in_half * kWordNeurons;
    const std::uint32_t exists = bits >= kWordNeurons ? ~0u : bits > 0 ? (1u << bits) - 1 : 0;
    const std::uint32_t used = columns_in_use(sums) & exists;
    if (threadIdx.x % 32 == 0) {
      masks[half][word] = used;
      chunk.masks[place * kMaskWords + word] = used;
    }
    __syncthreads();
    int rank = stored;
#pragma unroll
    for (int i = 0; i < kWarpsPerHalf; ++i) {
      const int count = __popc(masks[half][part * kWarpsPerHalf + i]);
      if (i < in_half) rank += count;
      stored += count;
    }
#pragma unroll
    for (int j = 0; j < kWordNeurons / 8; ++j) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const int bit = 8 * j + 2 * quad + parity;
        if (((used >> bit) & 1u) == 0) continue;
        std::uint32_t* column = out + (rank + __popc(used & ((1u << bit) - 1))) * kColumnWords;
#pragma unroll
        for (int i = 0; i < kSubtiles; ++i) {
          column[8 * i] = ptx::pack_relu(sums[i][j][parity], sums[i][j][2 + parity]);
        }
      }
    }
  }
}

}  // namespace

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate, int,
                   cudaStream_t stream) {
  return launch(gate_kernel, chunk.tiles * chunk.blocks, kThreads, kSharedBytes, stream, chunk,
                rows_of(chunk, x), static_cast<const __nv_bfloat16*>(gate));
}

}  // namespace twell::cuda::sm80
