#pragma once

#include <torch/torch.h>

namespace twell::app {

// y = x / √(mean(x²) + eps) ⊙ weight over the last dimension, computed in float32 and rounded to
// the dtype of x before and after the product with weight (as Hugging Face's Llama does).
// Differentiable. x [..., hidden], weight [hidden] of any floating type.
torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps);

}  // namespace twell::app
