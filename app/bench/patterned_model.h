#pragma once
// A whole model whose activation pattern is given, layer by layer: random weights alone are not
// sparse.

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "app/hf/config.h"
#include "app/model/llama.h"
#include "app/trace/trace.h"

namespace twell::app {

// A random model of `config` (untied, in bf16 over float32 weights) in which neuron n of layer l
// fires for token id v exactly where row v mod D of patterns[l mod patterns.size()] says so; D is
// the number of their rows, at most max_distinct_tokens(hidden_size) and at most the vocabulary.
//
// Construction: D columns of the residual stream are reserved. The embedding of id v has a spike in
// column v mod D, o_proj and down_proj write nothing to these columns, and the gate's weights there
// are ±: plus where the neuron is active. The spike outweighs all other columns together many
// times over; follows_patterns() checks it all the same.
Llama patterned_model(const ModelConfig& config, const std::vector<Trace>& patterns,
                      std::uint64_t seed, const torch::Device& device);

// Whether PyTorch's own gate projections on tokens [batch, length] are positive exactly where the
// patterns say, in every layer, for every token.
bool follows_patterns(Llama& model, const std::vector<Trace>& patterns,
                      const torch::Tensor& tokens);

// Batch `number` of `batch` windows of `length` ids, [batch, length] int64 on the CPU. Tokens side
// by side have neighbouring rows of the patterns, whose locality is theirs; windows and batches
// start at different rows.
torch::Tensor patterned_tokens(std::int64_t distinct, std::int64_t batch, std::int64_t length,
                               std::int64_t number);

}  // namespace twell::app
