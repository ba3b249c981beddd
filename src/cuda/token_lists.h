#pragma once
// The gradients of the weights, summed over tokens, by lists: for each block of 64 neurons those
// tokens of a pass that use one of them, and for each of these its coefficients that are not 0.
//
// The lists grow chunk by chunk into one arena and are multiplied once, after the last chunk. A
// chunk whose coefficients do not fit is *dense*: its products are made at once, half tile by half
// tile, from the columns of its coefficients, and their float32 sums kept, in two halves: the upper
// 16 bits in the gradients themselves, the lower ones in the workspace.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/backward.h"
#include "cuda/layout.h"
#include "twell/status.h"

namespace twell::cuda {

// What a half tile adds to a block's list, and where its columns are.
struct ListPart {
  // The listed tokens: bit 8 w + r of the first for token 16 w + r, of the second for the token 8
  // further on.
  std::uint32_t tokens[2];
  std::int32_t first;  // the block's positions in the tile's union: [first, first + columns)
  std::uint32_t columns_count;  // columns in bits 0-7, coefficients above

  __device__ int columns() const { return static_cast<int>(columns_count & 0xffu); }
  __device__ int coefficients() const { return static_cast<int>(columns_count >> 8); }
};

// A token of a list, and its part of the arena.
struct ListRow {
  std::uint32_t token;  // row of x and dy
  std::uint32_t place;  // how many coefficients in bits 0-6, the first above

  __device__ int count() const { return static_cast<int>(place & 0x7fu); }
  __device__ int first() const { return static_cast<int>(place >> 7); }
};

// The coefficients of a token and a neuron of the block, bf16.
struct ListEntry {
  std::uint32_t neuron_dg;  // the neuron within the block in bits 0-15, dg above
  std::uint32_t du_h;
};

static_assert(sizeof(ListPart) == 16 && sizeof(ListRow) == 8 && sizeof(ListEntry) == 8);

struct ListState {
  std::int32_t entries;       // in the arena
  std::int32_t dense;         // whether the chunk at hand is dense
  std::int32_t dense_chunks;  // so far, the one at hand included
  std::uint32_t finished;     // CTAs
  std::int32_t taken;         // pieces of work on the gradients
};

struct TokenLists {
  int blocks;          // ceil(N / 64)
  int capacity;        // rows of a list
  int entry_capacity;  // of the arena
  int first;           // the chunk's first token
  int parity;          // of the chunk's number

  ListState* state;
  ListPart* parts;           // [blocks, 2 tiles of a chunk]
  std::int32_t* half_first;  // [2 tiles of a chunk]: a half tile's first entry
  std::int32_t* counts;  // [2, blocks]: rows after this chunk at `parity`, before it at the other
  std::int32_t* order;   // [blocks]: by falling count
  ListRow* rows;         // [blocks, capacity]
  ListEntry* entries;    // [entry_capacity]
};

// The gradients [neurons, hidden] of a pass, null where not wanted, and the lower halves of the
// dense chunks' sums.
struct WeightGradients {
  void* gate;  // null for a plain block
  void* up;
  void* down;
  std::uint16_t* low[3];
};

// Resets the state and the counts, before the first chunk.
Status launch_begin_lists(const TokenLists& lists, cudaStream_t stream);

// parts, state; rows, entries and counts += those of a chunk that is not dense.
Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists,
                           cudaStream_t stream);

// order ← counts, after the last chunk.
Status launch_order_lists(const TokenLists& lists, cudaStream_t stream);

}  // namespace twell::cuda
