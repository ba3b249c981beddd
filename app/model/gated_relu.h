#pragma once
// The elementwise middle of the dense block, in one pass over memory each way.

#include <torch/torch.h>

namespace twell::app {

// What is counted of a block's activity beside its output.
enum class FfnCounts { kNone, kL1, kAll };

struct GatedRelu {
  torch::Tensor h;         // [tokens, neurons]
  torch::Tensor l1;        // Σ |h|, a float32 (for float64: float64) scalar
  torch::Tensor l0;        // number of gate > 0, an int64 scalar
  torch::Tensor activity;  // [neurons] int32: tokens with gate > 0
};

// h = relu(gate) ⊙ up, rounded to their dtype, and its counts. [tokens, neurons], contiguous.
// A NaN in gate stays NaN in h and counts as active. Counts that are not asked for may be left
// undefined.
GatedRelu gated_relu(const torch::Tensor& gate, const torch::Tensor& up, FfnCounts counts);

struct GatedReluGradients {
  torch::Tensor gate, up;  // [tokens, neurons]
};

// The gradients for gate and up, given dL/dh [tokens, neurons] and dL/d(Σ|h|), a scalar; if that is
// undefined, it is 0.
GatedReluGradients gated_relu_backward(const torch::Tensor& grad_h, const torch::Tensor& grad_l1,
                                       const torch::Tensor& gate, const torch::Tensor& up);

}  // namespace twell::app
