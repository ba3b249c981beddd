#pragma once
// What the kernels over lists of tokens share.

#include "cuda/token_lists.h"

namespace twell::cuda {

__device__ __forceinline__ int tokens_of(const ActiveTokens& active) {
  return __popc(active.words[0]) + __popc(active.words[1]);
}

// The rows that a part adds to its list.
__device__ __forceinline__ int rows_of(const ListPart& part) { return tokens_of(part.tokens); }

// Where the 64 neurons of a block stand in the union of a tile.
__device__ __forceinline__ std::int32_t* positions_of(const TokenLists& lists, int tile,
                                                      int block) {
  return lists.positions + (static_cast<std::size_t>(tile) * lists.blocks + block) * kRowNeurons;
}

}  // namespace twell::cuda
