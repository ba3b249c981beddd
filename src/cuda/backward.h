#pragma once
// The backward's intermediates and kernels. Tiles, masks, columns and unions are the forward's
// (forward.h); three coefficients take the place of its h, each as columns by union position, of
// the tiles of a round at once:
//
//   gated:  dg = dh ⊙ u where g > 0   du = dh ⊙ g   h = g ⊙ u
//   plain:  dg = dh where h > 0                     h
//
// with dh = dy Dᵀ + grad_l1 sign(h). For the gradients of the weights, the neurons go in blocks of
// 64, each with its own list of tokens. On Hopper see token_lists.h; on other GPUs a list is of
// those tokens of the round that contribute, each with a *row*: the coefficients of the block's
// neurons.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/forward.h"
#include "cuda/layout.h"
#include "twell/status.h"

namespace twell::cuda {

// What a half tile adds to a block's list of tokens, and where its coefficients are.
struct BlockTokens {
  std::uint32_t tokens[2];  // a bit for each of the half's 64 tokens
  std::int32_t first;       // the block's positions in the tile's union: [first, first + count)
  std::int32_t count;
};

static_assert(sizeof(BlockTokens) == 16);

// What the kernels of one chunk of tokens share, and those of one of its rounds.
struct BackwardChunk {
  // Masks, unions, counts, order, schedules; neither columns nor h. half_places: each half tile's
  // place in the saved columns, -1 if they are of no use.
  ForwardChunk forward;

  const void* x;         // [tokens, hidden] from the chunk's first token on
  const void* dy;        // the same
  const float* grad_l1;  // null: 0
  bool first;            // round of the pass
  bool last;             // chunk of the pass

  const std::uint32_t* saved_g;  // the forward's SavedColumns; null: none
  const std::uint32_t* saved_u;
  int saved_room;  // columns

  std::uint32_t* nonfinite;  // [2 tiles, 2]: a bit for each token that must be on every list
  std::uint32_t* dg;         // [room, 32], as the forward's h
  std::uint32_t* du;         // the same; null for a plain block
  std::uint32_t* h;          // the same

  // Whether the round at hand, which has tiles, is the last of the pass.
  __device__ bool in_last_round() const {
    const Schedule& round = *forward.schedule;
    return last && round.first_tile + round.tiles == forward.tiles;
  }
};

// A group of blocks of neurons, and their tokens.
struct NeuronRows {
  int first;     // neuron
  int blocks;    // of kRowNeurons
  int capacity;  // tokens of a list

  BlockTokens* parts;          // [blocks, 2 tiles of the round]
  std::int32_t* tokens;        // [blocks, capacity]: of the chunk, ascending
  std::int32_t* counts;        // [blocks]
  std::uint32_t* projections;  // [blocks, capacity, 32 or 64]: 64 dg, and 64 du of a gated block
  std::uint32_t* hidden;       // [blocks, capacity, 32]: 64 h
};

// The gradient of one matrix of weights [neurons, hidden]: the round's share is added to `totals`
// (not used where there is one round only), and the sum becomes `grad`, or is added to it, with the
// last round.
struct WeightGradient {
  void* grad;  // null: not wanted
  float* totals;
  bool accumulate;
};

struct TokenLists;

// The products of a round over its unions, for one family of GPUs, as Products (forward.h).
struct BackwardProducts {
  // dg, du, h ← x, dy and the weights; and on Hopper what lists need of them: active, silent_nans.
  Status (*coefficients)(const BackwardChunk& chunk, const TokenLists& lists,
                         const FfnWeights& weights, int multiprocessors, cudaStream_t stream);
  // dx [chunk tokens, hidden], of the round's ← dg G + du U (plain: dg U).
  Status (*input_gradient)(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                           int multiprocessors, cudaStream_t stream);
};

const BackwardProducts& backward_products_for(const Device& device);

// masks ← those of the forward, completed; half_places ← the forward's, but -1 where masks were
// completed and so the union is another; nonfinite; and resets the schedules. A NaN or an
// infinity in dy or in grad_l1 reaches every neuron, active or not, as 0 · inf is NaN.
Status launch_complete_masks(const BackwardChunk& chunk, const std::uint32_t* saved_masks,
                             const std::int32_t* saved_places, cudaStream_t stream);

// All of `rows` ← coefficients.
Status launch_neuron_rows(const BackwardChunk& chunk, const NeuronRows& rows, cudaStream_t stream);

}  // namespace twell::cuda
