#pragma once
// The gradients of the weights, summed over tokens, by lists: for each block of 64 neurons those
// tokens of a pass that use one of them, and the block's coefficients that are not 0. Blocks are
// not of neighbours but of neurons that are active about equally often, so that those of rare
// neurons have short lists.
//
// The lists grow round by round into one arena and are multiplied once, after the last round. A
// pass with more active (token, neuron) pairs than the arena has room for is *dense*: the products
// of each round are made at once, half tile by half tile, from the columns of its coefficients, and
// their float32 sums kept to 24 bits: the upper 16 in the gradients themselves, the others in the
// workspace, in the place of the lists.
//
// A pair that is not active has coefficients of 0, but where a product with 0 is NaN. Then the
// neuron's whole row of a gradient is NaN, which is noted (silent_nans) and not listed: so no more
// coefficients are listed than there are active pairs.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/backward.h"
#include "cuda/layout.h"
#include "twell/status.h"

namespace twell::cuda {

// For which tokens a neuron is active, g is not 0: bit 8 w + r of the first word is
// token 16 w + r of the half tile, of the second word the token 8 further on.
struct ActiveTokens {
  std::uint32_t words[2];
};

// What a half tile adds to a block's list.
struct ListPart {
  ActiveTokens tokens;  // all that are listed
  std::int32_t coefficients;
};

// What a round adds to a block's list.
struct ListShare {
  std::int32_t rows;
  std::int32_t coefficients;
};

// A token of a list, and its part of the arena. Each round's rows are filled up to a multiple of
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
  std::int32_t entries;    // in the arena
  std::uint32_t finished;  // CTAs
  std::int32_t taken;      // pieces of work on the gradients
};

static_assert(sizeof(ActiveTokens) == kActiveTokensBytes && sizeof(ListPart) == kListPartBytes &&
              sizeof(ListShare) == kListShareBytes && sizeof(ListRow) == kListRowBytes &&
              sizeof(ListEntry) == kListEntryBytes && sizeof(ListState) == kListStateBytes);
static_assert(kMaxEntries < 1 << 25, "ListRow::place has 25 bits for the first coefficient");

struct TokenLists {
  int blocks;          // ceil(N / 64)
  int capacity;        // rows of a list
  int entry_capacity;  // of the arena
  int first;           // the chunk's first token

  const unsigned long long* pairs;  // active ones of the pass: SavedColumns::active
  ListState* state;
  std::int32_t* neurons;        // [blocks, 64]: those of each block; negative: none
  std::uint32_t* silent_nans;   // [N]: kNanDu, kNanH where a pair that is not active has a NaN
  std::int32_t* positions;      // [chunk tiles, blocks, 64]: in the tile's union; negative: none
  ActiveTokens* active;         // [room]: of each column
  ListPart* parts;              // [blocks, 2 chunk tiles]
  ListShare* shares;            // [blocks]: 0 but while a round's parts are counted
  std::int32_t* first_rows;     // [blocks]: of the round at hand
  std::int32_t* first_entries;  // [blocks]: the same
  std::int32_t* counts;         // [blocks]: rows, the round at hand included
  std::int32_t* order;          // [blocks]: by falling count
  ListRow* rows;                // [blocks, capacity]
  ListEntry* entries;           // [entry_capacity]

  static constexpr std::uint32_t kNanDu = 1, kNanH = 2;

  __device__ bool dense() const { return *pairs > static_cast<unsigned long long>(entry_capacity); }
};

// The gradients [neurons, hidden] of a pass, null where not wanted, whether it adds to them, and
// what more a dense pass keeps of its sums.
struct WeightGradients {
  void* gate;  // null for a plain block
  void* up;
  void* down;
  bool accumulate;
  std::uint8_t* low[3];
};

// neurons, with the first round. activity [N], which is 0: its active tokens of each neuron.
Status launch_sort_neurons(const BackwardChunk& chunk, const TokenLists& lists,
                           std::int32_t* activity, cudaStream_t stream);

// Of a round, whose coefficients, active and silent_nans are made: parts; and if the pass is not
// dense, rows and entries, to which its own are added. Before the first round state, shares, counts
// and silent_nans are 0.
Status launch_add_to_lists(const BackwardChunk& chunk, const TokenLists& lists, int multiprocessors,
                           cudaStream_t stream);

// order ← counts, after the last round.
Status launch_order_lists(const TokenLists& lists, cudaStream_t stream);

}  // namespace twell::cuda
