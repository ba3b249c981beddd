// From coefficients by tile and union position to rows by block of neurons and token, in two steps:
// which tokens of a half tile contribute to a block, then the rows, whose places follow from the
// counts of all half tiles before.

#include "cuda/backward.h"
#include "cuda/check.h"

namespace twell::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowWords = kRowNeurons / 2;

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// Bits 0 to 15 of a half's tokens 32 i and on, as two ballots over the words of a column have them:
// lane 8 w + r stands for token 16 w + r in the first, 16 w + r + 8 in the second.
__device__ __forceinline__ std::uint32_t in_token_order(std::uint32_t low, std::uint32_t high,
                                                        int i) {
  low >>= 16 * i;
  high >>= 16 * i;
  return (low & 0xffu) | (high & 0xffu) << 8 | (low & 0xff00u) << 8 | (high & 0xff00u) << 16;
}

// Bits of the tokens below `exist`, of 32.
__device__ __forceinline__ std::uint32_t lowest_bits(int exist) {
  return exist >= 32 ? ~0u : exist > 0 ? (1u << exist) - 1 : 0;
}

// One warp per block and half tile, one lane per word of a column.
__global__ void __launch_bounds__(kThreads)
    tokens_kernel(const BackwardChunk chunk, const NeuronRows rows) {
  const ForwardChunk& forward = chunk.forward;
  const Schedule& round = *forward.schedule;
  const int halves = 2 * round.tiles;
  const int item = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (item >= rows.blocks * halves) return;
  const int block = item / halves;
  const int half_tile = 2 * round.first_tile + item % halves;
  const int lane = threadIdx.x % 32;

  // The block's positions in the union, from the number of neurons before it.
  const int words = forward.blocks * kMaskWords;
  const std::uint32_t* masks =
      forward.masks + static_cast<std::size_t>(half_tile & ~1) * words;  // of the tile
  const int word = (rows.first + block * kRowNeurons) / 32;
  int before = 0;
  for (int w = lane; w < word; w += 32) before += __popc(masks[w] | masks[words + w]);
  const int first = warp_sum(before);
  int count = 0;
#pragma unroll
  for (int w = word; w < word + kRowNeurons / 32; ++w) {
    count += __popc(masks[w] | masks[words + w]);
  }

  std::uint32_t any = 0;
  const std::int64_t column = std::int64_t{forward.halves[half_tile].base} + first;
  for (int i = 0; i < count; ++i) {
    const std::int64_t at = (column + i) * kColumnWords + lane;
    any |= chunk.dg[at] | chunk.h[at];
    if (chunk.du) any |= chunk.du[at];
  }
  const std::uint32_t low = __ballot_sync(~0u, (any & 0x7fffu) != 0);
  const std::uint32_t high = __ballot_sync(~0u, (any & 0x7fff0000u) != 0);
  if (lane != 0) return;
  BlockTokens part;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    part.tokens[i] = (in_token_order(low, high, i) | chunk.nonfinite[2 * half_tile + i]) &
                     lowest_bits(forward.tokens - half_tile * kHalfTokens - 32 * i);
  }
  part.first = first;
  part.count = count;
  rows.parts[item] = part;
}

// One CTA per block and half tile.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const BackwardChunk chunk, const NeuronRows rows) {
  // By token and neuron; the odd stride, in words, keeps banks apart.
  __shared__ std::uint32_t values[3][kHalfTokens][kRowWords + 1];
  const ForwardChunk& forward = chunk.forward;
  const Schedule& round = *forward.schedule;
  const int halves = 2 * round.tiles;
  if (static_cast<int>(blockIdx.x) >= rows.blocks * halves) return;
  const int block = blockIdx.x / halves;
  const int index = blockIdx.x % halves;  // of the half tile in the round
  const int half_tile = 2 * round.first_tile + index;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const BlockTokens* parts = rows.parts + block * halves;
  const BlockTokens part = parts[index];
  const auto count_of = [](const BlockTokens& p) {
    return __popc(p.tokens[0]) + __popc(p.tokens[1]);
  };
  int before = 0;
  for (int i = lane; i < index; i += 32) before += count_of(parts[i]);
  before = warp_sum(before);
  if (index == halves - 1 && threadIdx.x == 0) rows.counts[block] = before + count_of(part);
  if (count_of(part) == 0) return;

  std::uint32_t* all_values = &values[0][0][0];
  for (int i = threadIdx.x; i < 3 * kHalfTokens * (kRowWords + 1); i += kThreads) {
    all_values[i] = 0;
  }
  __syncthreads();
  const std::uint32_t* const sources[3] = {chunk.dg, chunk.du, chunk.h};
  const UnionEntry* entries =
      forward.unions + static_cast<std::size_t>(half_tile / 2) * forward.capacity + part.first;
  const std::int64_t column = std::int64_t{forward.halves[half_tile].base} + part.first;
  const int token = lane / 8 * 16 + lane % 8;
  for (int i = warp; i < part.count; i += kWarps) {
    const int neuron = static_cast<int>(entries[i].row()) - rows.first - block * kRowNeurons;
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      if (!sources[s]) continue;
      const std::uint32_t pair = sources[s][(column + i) * kColumnWords + lane];
      reinterpret_cast<std::uint16_t*>(values[s][token])[neuron] = static_cast<std::uint16_t>(pair);
      reinterpret_cast<std::uint16_t*>(values[s][token + 8])[neuron] =
          static_cast<std::uint16_t>(pair >> 16);
    }
  }
  __syncthreads();

  const int projections = chunk.du ? 2 : 1;
  const std::size_t list = static_cast<std::size_t>(block) * rows.capacity;
  for (int t = warp; t < kHalfTokens; t += kWarps) {
    const std::uint32_t bit = 1u << (t % 32);
    if ((part.tokens[t / 32] & bit) == 0) continue;
    const std::size_t row = list + before + (t < 32 ? 0 : __popc(part.tokens[0])) +
                            __popc(part.tokens[t / 32] & (bit - 1));
    if (lane == 0) rows.tokens[row] = half_tile * kHalfTokens + t;
    std::uint32_t* out = rows.projections + row * projections * kRowWords + lane;
    out[0] = values[0][t][lane];
    if (projections == 2) out[kRowWords] = values[1][t][lane];
    rows.hidden[row * kRowWords + lane] = values[2][t][lane];
  }
}

}  // namespace

Status launch_neuron_rows(const BackwardChunk& chunk, const NeuronRows& rows, cudaStream_t stream) {
  const int items = rows.blocks * 2 * chunk.forward.tiles;
  Status status = launch(tokens_kernel, ceil_div(items, kWarps), kThreads, 0, stream, chunk, rows);
  if (!status.ok()) return status;
  return launch(rows_kernel, items, kThreads, 0, stream, chunk, rows);
}

}  // namespace twell::cuda
