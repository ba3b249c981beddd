#pragma once
// Token by token through a model: the keys and values of the tokens before are kept, and on a CUDA
// device each step is the replay of a captured graph.

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "app/model/llama.h"
#include "app/model/step_graph.h"

namespace twell::app {

class Decoder {
 public:
  // At most `max_length` tokens in all. The model must outlive it.
  Decoder(Llama& model, FfnMode ffn, int64_t max_length);

  // prompt [length] int64 → the logits of the token after it, [vocab].
  torch::Tensor prefill(const torch::Tensor& prompt);
  // The logits of the token after `token`, [vocab]; the next call overwrites them.
  torch::Tensor step(int64_t token);

  int64_t length() const { return cache_.length; }

 private:
  void capture();

  Llama& model_;
  KvCache cache_;
  ForwardOptions options_;
  torch::Tensor token_, logits_;  // [1, 1] int64, [vocab]: what the graph reads and writes
  std::unique_ptr<StepGraph> graph_;
};

}  // namespace twell::app
