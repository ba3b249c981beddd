#pragma once
// Activation checkpointing (arXiv 1604.06174): time for memory.

#include <torch/torch.h>

#include <functional>
#include <vector>

namespace twell::app {

// run(x), of which only x is kept for backward: there `run` is called a second time, and its
// activations live no longer than its own gradients take. Values and gradients have the bits that
// run(x) alone gives.
//
// `run` must be deterministic and give the same number of outputs each time; what it reads beside x
// and `parameters` must stay as it is until backward. `parameters` are the leaves that it uses;
// only they and x get gradients. Outputs of integers, and those that do not depend on either, are
// not differentiable. Without gradients (GradMode) it is run(x).
torch::autograd::variable_list recompute(
    std::function<torch::autograd::variable_list(const torch::Tensor& x)> run,
    const torch::Tensor& x, const std::vector<torch::Tensor>& parameters);

}  // namespace twell::app
