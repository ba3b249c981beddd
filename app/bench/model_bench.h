#pragma once
// Times a whole model with twell's blocks against the same model with dense ones, in one process.

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "app/model/llama.h"

namespace twell::app {

enum class ModelWork {
  kForward,  // blocks, final norm and the logits of each window's last token, as a prefill does
  kEval,     // blocks, final norm and the loss of every token
  kTrain,    // the same with Σ|h|, backward and AdamW
};

const char* name_of(ModelWork work);  // "forward", "eval", "train"

struct ModelBenchOptions {
  ModelWork work = ModelWork::kForward;
  bool recompute = false;  // training keeps only the layers' inputs for backward
  std::vector<FfnMode> forms{FfnMode::kDense, FfnMode::kTwell};  // different ones
  double seconds = 8;                                            // of timing, about
  bool kernels = false;                                          // time those of a step too (GPU)
  std::function<void(double done)> progress{};                   // in [0, 1]
};

// Runs steps of `model` on `batches`, each [windows, tokens + 1] ids on the model's device. When
// training, the learning rate is so small (1e-6) that the weights, and with them the activity, stay
// what they are.
// A round runs every form once on one batch, in turning order; times are medians over rounds, after
// two rounds that warm up. Nothing but how the blocks run differs between the forms.
//
// Error unless all forms have the same loss, within 0.2%, and when training the same norm of the
// gradient, within 5%, on every batch of every round. For kForward the loss is computed apart,
// after the time is taken.
//
// Memory is the peak of one step in each form (app/bench/peak_memory.h), energy that of steps for
// at least 5 s (app/bench/energy.h); null where unknown, for energy with the reason. With
// `kernels`, the GPU's kernels in one step of each form, most time first
// (app/bench/kernel_times.h). Fields: mode, checkpoint_activations, batch, tokens (of a window),
// parameters, layers, hidden, neurons, heads, kv_heads, vocabulary; for each form FORM_ms; ratio,
// of the first form's time to the last one's; spread_ms, tokens_per_second, loss, gradient_norm,
// peak_bytes, energy_mj_per_token, ffn_per_layer and, if asked for, kernels ([{name, calls, ms}])
// by form; energy_missing; active_per_layer, loss_difference (greatest, relative), rounds.
nlohmann::ordered_json bench_model(Llama& model, const std::vector<torch::Tensor>& batches,
                                   const ModelBenchOptions& options);

}  // namespace twell::app
