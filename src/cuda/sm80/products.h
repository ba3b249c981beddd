#pragma once
// The products on every GPU since Ampere (sm_80), shipped as PTX: mma.sync and cp.async.

#include "cuda/backward.h"
#include "cuda/forward.h"

namespace twell::cuda::sm80 {

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream);
Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream);
Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream);

// The backward's, as in backward.h.
Status launch_coefficients(const BackwardChunk& chunk, const TokenLists& lists,
                           const FfnWeights& weights, int multiprocessors, cudaStream_t stream);
Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                             int multiprocessors, cudaStream_t stream);

// Those that all other families use too: the rows of the gradients that belong to a group of
// neurons: of the projections of x, dgᵀ x and duᵀ x (plain: dgᵀ x only, into gradients[0]), and of
// the down projection, hᵀ dy.
Status launch_projection_gradients(const BackwardChunk& chunk, const NeuronRows& rows,
                                   const WeightGradient (&gradients)[2], cudaStream_t stream);
Status launch_down_gradient(const BackwardChunk& chunk, const NeuronRows& rows,
                            const WeightGradient& gradient, cudaStream_t stream);

}  // namespace twell::cuda::sm80
