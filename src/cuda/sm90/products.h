#pragma once
// The products on Hopper (sm_90a): WGMMA and TMA.

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/token_lists.h"

namespace twell::cuda::sm90 {

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream);
Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream);
Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream);

// The share of a round in the gradients, kept, the first one's with what they held if the pass
// accumulates; nothing if it is not dense.
Status launch_dense_gradients(const BackwardChunk& chunk, const TokenLists& lists,
                              const WeightGradients& gradients, int multiprocessors,
                              cudaStream_t stream);

// gradients ← or += those of all lists, or ← what was kept of a dense pass. `x`, `dy` of the whole
// pass; of `chunk` only what is the same for all.
Status launch_list_gradients(const BackwardChunk& chunk, const TokenLists& lists, const void* x,
                             const void* dy, const WeightGradients& gradients, int multiprocessors,
                             cudaStream_t stream);

// Of the tiles whose columns the forward has not kept: g into the place of h, u into that of du.
Status launch_remake(const BackwardChunk& chunk, const FfnWeights& weights, int multiprocessors,
                     cudaStream_t stream);

// The backward's, as in backward.h; the coefficients after launch_remake.
Status launch_coefficients(const BackwardChunk& chunk, const TokenLists& lists,
                           const FfnWeights& weights, int multiprocessors, cudaStream_t stream);
Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                             int multiprocessors, cudaStream_t stream);

}  // namespace twell::cuda::sm90
