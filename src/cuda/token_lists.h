#pragma once
// The gradients of the weights, summed over tokens, by lists: for each block of 64 neurons those
// tokens of a pass that use one of them, and the block's coefficients that are not 0. Blocks are
// not of neighbours but of neurons that are active about equally often, so that those of rare
// neurons have short lists.
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

// Which of a column's values are not 0 in any of the coefficients: bit 8 w + r of the first word is
// token 16 w + r of the half tile, of the second word the token 8 further on.
struct ActiveTokens {
  std::uint32_t words[2];
};

// What a half tile adds to a block's list.
struct ListPart {
  ActiveTokens tokens;  // all that are listed
  std::int32_t coefficients;
};

// A token of a list, and its part of the arena. Each chunk's rows are filled up to a multiple of
// 64 with kNoToken, so that 64 rows' coefficients lie side by side.
struct ListRow {
  static constexpr std::uint32_t kNoToken = ~0u;

  std::uint32_t token;  // row of x and dy
  std::uint32_t place;  // how many coefficients in bits 0-6, the first above

  __device__ int first() const { return static_cast<int>(place >> 7); }
  __device__ int end() const { return first() + static_cast<int>(place & 0x7fu); }
};

// The coefficients of a token and a neuron of the block, bf16.
struct ListEntry {
  std::uint32_t place_dg;  // neuron of the block in bits 0-5, row modulo 64 in bits 6-11; dg above
  std::uint32_t du_h;

  __device__ std::uint32_t neuron() const { return place_dg & 63u; }
  __device__ std::uint32_t row() const { return place_dg >> 6 & 63u; }
};

struct ListState {
  std::int32_t entries;       // in the arena
  std::int32_t dense;         // whether the chunk at hand is dense
  std::int32_t dense_chunks;  // so far, the one at hand included
  std::uint32_t finished;     // CTAs
  std::int32_t taken;         // pieces of work on the gradients
};

static_assert(sizeof(ActiveTokens) == kActiveTokensBytes && sizeof(ListPart) == kListPartBytes &&
              sizeof(ListRow) == kListRowBytes && sizeof(ListEntry) == kListEntryBytes &&
              sizeof(ListState) == kListStateBytes);
static_assert(kMaxEntries < 1 << 25, "ListRow::place has 25 bits for the first coefficient");

struct TokenLists {
  int blocks;          // ceil(N / 64)
  int capacity;        // rows of a list
  int entry_capacity;  // of the arena
  int first;           // the chunk's first token
  int parity;          // of the chunk's number

  ListState* state;
  std::int32_t* activity;  // [N]: active tokens of the first chunk
  std::int32_t* neurons;   // [blocks, 64]: those of each block; negative: none
  std::int32_t*
      positions;         // [tiles of a chunk, blocks, 64]: in the tile's union; negative: not there
  ActiveTokens* active;  // [2 tiles of a chunk, capacity]: by union position
  ListPart* parts;       // [blocks, 2 tiles of a chunk]
  std::int32_t* block_first;  // [blocks]: the chunk's first entry
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

// Resets the state, the counts and the activity, before the first chunk.
Status launch_begin_lists(const TokenLists& lists, int neurons, cudaStream_t stream);

// active, parts, state; with the first chunk neurons; rows, entries and counts += those of a chunk
// that is not dense.
Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists,
                           cudaStream_t stream);

// order ← counts, after the last chunk.
Status launch_order_lists(const TokenLists& lists, cudaStream_t stream);

}  // namespace twell::cuda
