#pragma once
// What a training run needs to go on as if it had never stopped, in one file that is replaced
// atomically: DIR/checkpoint.safetensors, with the weights, the optimizer's moments, the idle
// counters of the neurons and the sums for the next line of metrics as tensors, and the rest as
// JSON in its metadata.

#include <filesystem>
#include <nlohmann/json.hpp>

#include "app/model/ffn.h"
#include "app/model/llama.h"
#include "app/train/optimizer.h"
#include "app/train/options.h"
#include "app/train/revival.h"
#include "app/train/schedule.h"

namespace twell::app {

// Sums over the steps since the last line of metrics.
struct MetricsWindow {
  torch::Tensor figures;                // float64, of the steps' figures
  std::vector<torch::Tensor> activity;  // per layer [neurons] int64
  std::vector<int64_t> revived;         // per layer
  int64_t steps = 0, tokens = 0;
  double seconds = 0;  // spent in the steps
};

struct TrainingState {
  TrainOptions options;
  int64_t step = 0;             // steps done
  double seconds = 0;           // spent until then
  double step_seconds = 0;      // of them in steps
  std::vector<double> figures;  // of the last step, which the controller has not seen yet
  L1Controller controller;
  std::vector<FfnChooser> choosers;
  int64_t revived = 0;  // neurons so far
  MetricsWindow window;
  uint64_t corpus_hash = 0;  // of the tokens; the step alone then gives the position in them
};

std::filesystem::path checkpoint_path(const std::filesystem::path& folder);

void save_checkpoint(const std::filesystem::path& folder, const TrainingState& state,
                     const Llama& model, const AdamW& optimizer, const Revival& revival);

// The state alone. Errors: no checkpoint; not one of ours.
TrainingState read_checkpoint_state(const std::filesystem::path& folder);

// Copies the tensors into `model`, `optimizer` and `revival`, whose shapes must fit, and loads
// those of state.window.
void read_checkpoint_tensors(const std::filesystem::path& folder, TrainingState& state,
                             Llama& model, AdamW& optimizer, Revival& revival);

}  // namespace twell::app
