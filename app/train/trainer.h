#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "app/train/options.h"

namespace twell::app {

// A training run in `folder`: fresh, or resumed from its checkpoint. Writes there
//   config.json, tokenizer.json, tokenizer_config.json, model.safetensors   the model, when done
//   metrics.jsonl            a line every log_every steps
//   checkpoint.safetensors   every checkpoint_every steps, and when interrupted
//   summary.json             what run() returns
// The loss is the mean cross entropy (nats) plus λ · the mean over layers and tokens of Σ|h|.
struct TrainRun {
  std::filesystem::path folder;
  torch::Device device = torch::kCPU;
  bool resume = false;  // then `options` come from the checkpoint
  TrainOptions options;
};

// Trains to the end and returns the summary. SIGINT and SIGTERM save a checkpoint after the step
// and end in an Error that says how to go on.
nlohmann::ordered_json train(const TrainRun& run);

}  // namespace twell::app
