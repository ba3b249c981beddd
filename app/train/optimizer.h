#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace twell::app {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;  // decoupled; on matrices only, not on norms and biases
  double clip = 1.0;          // the gradient's greatest global norm; 0: no clipping
};

// AdamW (arXiv 1711.05101) on float32 parameters, by libtorch's fused kernel.
class AdamW {
 public:
  AdamW(const std::map<std::string, torch::Tensor>& parameters, const AdamWOptions& options);

  // Clips the gradients, updates every parameter and drops the gradients. Returns the gradient's
  // global norm before clipping, a scalar on the parameters' device that nobody has waited for; if
  // it is not finite nothing is updated.
  torch::Tensor step(double learning_rate);

  // Zeroes the moments of the slices `rows` (int64) along the first dimension of the parameter
  // `name`.
  void forget_rows(const std::string& name, const torch::Tensor& rows);

  // The moments by parameter name, under "adam.m." and "adam.v.": they share memory with this.
  std::map<std::string, torch::Tensor> state() const;
  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }

 private:
  struct Group {
    double weight_decay;
    std::vector<torch::Tensor> parameters, m, v;
    std::vector<std::string> names;
  };
  AdamWOptions options_;
  std::vector<Group> groups_;
  int64_t steps_ = 0;
  torch::Tensor step_count_;  // steps_, where the fused kernel reads it: beside the parameters
};

}  // namespace twell::app
