// Hopper's own kernels are not simulated.

#include "cuda/sm90/products.h"

namespace twell::cuda::sm90 {
namespace {

Status refuse() { return {StatusCode::kUnsupported, "sm90: not simulated; permitted: a GPU"}; }

}  // namespace

Status launch_gate(const ForwardChunk&, const Tokens&, const void*, int, cudaStream_t) {
  return refuse();
}

Status launch_up(const ForwardChunk&, const Tokens&, const void*, int, cudaStream_t) {
  return refuse();
}

Status launch_down(const ForwardChunk&, const void*, void*, int, cudaStream_t) { return refuse(); }

Status launch_remake(const BackwardChunk&, const FfnWeights&, int, cudaStream_t) {
  return refuse();
}

Status launch_coefficients(const BackwardChunk&, const FfnWeights&, int, cudaStream_t) {
  return refuse();
}

Status launch_input_gradient(const BackwardChunk&, const FfnWeights&, void*, int, cudaStream_t) {
  return refuse();
}

Status launch_dense_gradients(const BackwardChunk&, const TokenLists&, const WeightGradients&, int,
                              cudaStream_t) {
  return refuse();
}

Status launch_list_gradients(const BackwardChunk&, const TokenLists&, const void*, const void*,
                             const WeightGradients&, int, cudaStream_t) {
  return refuse();
}

}  // namespace twell::cuda::sm90
