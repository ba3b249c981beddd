#pragma once
// The loss of a model on a stream of tokens, and how active its neurons are.

#include <cstdint>
#include <functional>
#include <vector>

#include "app/data/tokens.h"
#include "app/model/llama.h"

namespace twell::app {

struct LayerActivity {
  double active = 0;     // mean active neurons per token
  int64_t silent = 0;    // neurons that were never active
  torch::Tensor counts;  // [neurons] int64: tokens for which the neuron was active
};

struct Evaluation {
  double loss = 0;     // nats per token
  int64_t tokens = 0;  // scored
  double seconds = 0;
  std::vector<LayerActivity> layers;  // of ReLU models, else empty
  std::vector<FfnPath> paths;         // what each layer ran last; of ReLU models

  double perplexity() const;
  double active() const;  // mean over layers
};

struct EvaluationOptions {
  FfnMode ffn = FfnMode::kDense;
  int64_t context = 256;                      // tokens a window sees
  int64_t batch = 16;                         // windows at a time
  int64_t max_tokens = 0;                     // scored at most; 0: all
  std::function<void(double done)> progress;  // in [0, 1]
};

// Cuts `stream` into windows of context + 1 tokens that overlap by one, so that every token but
// the stream's first is scored once, given the tokens before it in its window; a last, shorter
// window is scored too. Throws Error if there are fewer than two tokens.
Evaluation evaluate(Llama& model, const TokenStream& stream, const EvaluationOptions& options);

// The mean of -log p(token), in nats, over the first `tokens` tokens of `heldout`, where p is the
// frequency of the token in `train`, each count plus one: what a model that ignores all context
// comes to.
double unigram_loss(const TokenStream& train, const TokenStream& heldout, int64_t tokens,
                    int64_t vocabulary);

}  // namespace twell::app
