#pragma once
// What the kernels over lists of tokens share.

#include "cuda/token_lists.h"

namespace twell::cuda {

// The rows that a part adds to its list.
__device__ __forceinline__ int rows_of(const ListPart& part) {
  return __popc(part.tokens.words[0]) + __popc(part.tokens.words[1]);
}

// Where a neuron stands in the union of a tile; negative: not in it.
__device__ __forceinline__ int union_position(const ForwardChunk& chunk, int tile, int neuron) {
  if (neuron < 0) return -1;
  const int words = chunk.blocks * kMaskWords;
  const int word = neuron / 32;
  const std::uint32_t* masks = chunk.masks + static_cast<std::size_t>(2 * tile) * words + word;
  const std::uint32_t used = masks[0] | masks[words];
  if (((used >> (neuron % 32)) & 1u) == 0) return -1;
  return chunk.word_first[tile * words + word] + __popc(used & ((1u << (neuron % 32)) - 1));
}

}  // namespace twell::cuda
