#pragma once
// The gate's product of the dense block and what lies between it and the down product, in as few
// passes over memory as PyTorch has.

#include <torch/torch.h>

namespace twell::app {

// What is counted of a block's activity beside its output.
enum class FfnCounts { kNone, kL1, kAll };

// The gate's product of x [tokens, hidden] and gate [neurons, hidden], as gated_relu() and
// gated_relu_backward() take it: relu(x Gᵀ) [tokens, neurons], on a GPU by the product's own
// epilogue. For bf16 on the CPU it is x Gᵀ still: there those two take the relu as they read it.
torch::Tensor gate_product(const torch::Tensor& x, const torch::Tensor& gate);

struct GatedRelu {
  torch::Tensor h;         // [tokens, neurons]
  torch::Tensor l1;        // Σ |h|, a float32 (for float64: float64) scalar
  torch::Tensor l0;        // number of active (token, neuron) pairs, an int64 scalar
  torch::Tensor activity;  // [neurons] int32: tokens for which the neuron was active
};

// h = relu(x Gᵀ) ⊙ up, rounded to their dtype, and its counts; `gate` is a gate_product().
// [tokens, neurons], contiguous. A NaN in gate stays NaN in h and counts as active. Counts that are
// not asked for may be left undefined. Unless `keep_gate`, h may take the memory of `gate`.
GatedRelu gated_relu(const torch::Tensor& gate, const torch::Tensor& up, FfnCounts counts,
                     bool keep_gate);

struct GatedReluGradients {
  torch::Tensor gate, up;  // [tokens, neurons]
};

// The gradients for x Gᵀ and up, given dL/dh [tokens, neurons] and dL/d(Σ|h|), a scalar; if that is
// undefined, it is 0. `gate` is a gate_product().
GatedReluGradients gated_relu_backward(const torch::Tensor& grad_h, const torch::Tensor& grad_l1,
                                       const torch::Tensor& gate, const torch::Tensor& up);

}  // namespace twell::app
