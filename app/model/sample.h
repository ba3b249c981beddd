#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace twell::app {

struct SampleOptions {
  double temperature = 0.8;  // 0: the likeliest token
  int64_t top_k = 0;         // keep the k likeliest; 0: all
  double top_p = 1.0;        // keep the likeliest that together reach this probability
  uint64_t seed = 0;
};

// Draws tokens from logits; the same seed gives the same tokens.
class Sampler {
 public:
  explicit Sampler(const SampleOptions& options);

  // logits [vocab] of any floating type and device. Throws Error if they hold a NaN.
  int64_t draw(const torch::Tensor& logits);

 private:
  SampleOptions options_;
  torch::Generator generator_;
};

}  // namespace twell::app
