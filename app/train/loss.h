#pragma once

#include <torch/torch.h>

namespace twell::app {

// The mean of -log softmax(hidden headᵀ)[target] over all tokens, in nats, a float32 scalar;
// differentiable in hidden and head. The logits exist for a part of the tokens at a time only:
// where gradients are wanted, they are made in the same pass.
// hidden [tokens, hidden], head [vocab, hidden] of one dtype; targets [tokens] int64.
torch::Tensor linear_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& head,
                                   const torch::Tensor& targets);

}  // namespace twell::app
