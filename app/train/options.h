#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace twell::app {

// All that defines a training run; stored in its checkpoints, so that --resume needs nothing else.
struct TrainOptions {
  std::vector<std::string> data;  // absolute, so that a resumed run may start anywhere
  double heldout = 0.05;          // share of the documents
  std::string tokenizer;          // tokenizer.json or a folder that holds one
  std::string eos;                // the token that separates documents; empty: found by its name
  std::string init;               // a Hugging Face directory to start from; empty: random weights

  int64_t layers = 4;
  int64_t hidden = 256;
  int64_t neurons = 1536;
  int64_t heads = 4;
  int64_t kv_heads = 4;
  int64_t context = 256;

  int64_t steps = 0;                    // 0: as many as fit into max_seconds
  double max_seconds = 0;               // 0: as long as `steps` take
  int64_t batch = 16;                   // windows of `context` tokens at a time
  int64_t accumulate = 1;               // batches per step
  bool checkpoint_activations = false;  // keep only the layers' inputs for backward
  double lr = 3e-3;
  double lr_floor = 0.1;  // of lr, at the end
  double warmup = 0.05;   // of the run
  double weight_decay = 0.1;
  double clip = 1.0;
  uint64_t seed = 0;
  bool deterministic = true;  // attention's backward too, which costs a GPU some time

  std::string target_active = "4%";  // neurons, or with % a share of them; 0: λ is not steered
  double lambda = 1e-4;              // λ at the end of its warm-up
  double arrival = 0.5;              // when the target is to be reached, as a share of the run
  int64_t revive_after = 0;          // steps without firing until a neuron is revived; 0: never
  std::string ffn = "auto";

  int64_t log_every = 10;
  int64_t eval_every = 200;
  int64_t eval_tokens = 32768;
  int64_t checkpoint_every = 200;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TrainOptions, data, heldout, tokenizer, eos, init, layers,
                                   hidden, neurons, heads, kv_heads, context, steps, max_seconds,
                                   batch, accumulate, checkpoint_activations, lr, lr_floor, warmup,
                                   weight_decay, clip, seed, deterministic, target_active, lambda,
                                   arrival, revive_after, ffn, log_every, eval_every, eval_tokens,
                                   checkpoint_every)

// "52" or "4%" as a number of a layer's neurons, where layers have `neurons` on average. Error if
// it is neither, or not in [0, neurons].
double parse_target_active(const std::string& text, double neurons);

// Throws Error naming the first option outside its range.
void validate(const TrainOptions& options);

}  // namespace twell::app
