#pragma once
// The products on Hopper (sm_90a): WGMMA and TMA.

#include "cuda/backward.h"
#include "cuda/forward.h"

namespace twell::cuda::sm90 {

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream);
Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream);
Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream);

// The backward's, as in backward.h; the coefficients of those tiles only whose columns the forward
// has kept.
Status launch_coefficients(const BackwardChunk& chunk, const FfnWeights& weights,
                           int multiprocessors, cudaStream_t stream);
Status launch_input_gradient(const BackwardChunk& chunk, const FfnWeights& weights, void* dx,
                             int multiprocessors, cudaStream_t stream);

}  // namespace twell::cuda::sm90
