#include "app/bench/patterned_model.h"

#include <cmath>
#include <string>

#include "app/bench/patterned_ffn.h"
#include "app/error.h"

namespace twell::app {
namespace {

using torch::Tensor;

constexpr double kSpike = 8;  // of the embeddings, in √hidden; blocks add about 1 per column
constexpr double kSpikeWeight = 4;  // reserved weights, in standard deviations of the others

const Trace& pattern_of(const std::vector<Trace>& patterns, int layer) {
  return patterns[static_cast<std::size_t>(layer) % patterns.size()];
}

void check(const ModelConfig& config, const std::vector<Trace>& patterns) {
  if (patterns.empty()) throw Error("a patterned model needs at least one pattern");
  const std::int64_t most = std::min(max_distinct_tokens(config.hidden_size), config.vocab_size);
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const std::int64_t pattern = pattern_of(patterns, layer).neurons;
    const std::int64_t neurons = config.intermediate_size[layer];
    if (pattern != neurons) {
      throw Error("the pattern of layer " + std::to_string(layer) + " has " +
                  std::to_string(pattern) + " neurons, the layer has " + std::to_string(neurons));
    }
  }
  for (const Trace& pattern : patterns) {
    if (pattern.tokens() < 1 || pattern.tokens() > most ||
        pattern.tokens() != patterns.front().tokens()) {
      throw Error("a pattern of " + std::to_string(pattern.tokens()) +
                  " tokens does not fit; all need one number of tokens, from 1 to " +
                  std::to_string(most));
    }
  }
}

}  // namespace

Llama patterned_model(const ModelConfig& config, const std::vector<Trace>& patterns,
                      std::uint64_t seed, const torch::Device& device) {
  check(config, patterns);
  const torch::NoGradGuard no_grad;
  Llama model = Llama::create(config, seed, torch::kBFloat16, device);
  const std::int64_t reserved = patterns.front().tokens();
  const auto weight = [&](int layer, const std::string& name) {
    return model.parameters().at("model.layers." + std::to_string(layer) + "." + name + ".weight");
  };
  Tensor embedding = model.parameters().at("model.embed_tokens.weight");  // [vocab, hidden]
  const Tensor id = torch::arange(config.vocab_size, embedding.options().dtype(torch::kInt64));
  embedding.narrow(1, 0, reserved).zero_();
  const double spike = kSpike * std::sqrt(static_cast<double>(config.hidden_size));
  embedding.index_put_({id, id.remainder(reserved)}, torch::full({}, spike, embedding.options()));
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    weight(layer, "self_attn.o_proj").narrow(0, 0, reserved).zero_();  // [hidden, queries]
    weight(layer, "mlp.down_proj").narrow(1, 0, reserved).zero_();     // [neurons, hidden]
    const double strength = kSpikeWeight * config.initializer_range;
    const Tensor active = dense_pattern(pattern_of(patterns, layer)).t();  // [neurons, reserved]
    weight(layer, "mlp.gate_proj")
        .narrow(1, 0, reserved)
        .copy_(torch::where(active, strength, -strength));
  }
  return model;
}

bool follows_patterns(Llama& model, const std::vector<Trace>& patterns, const Tensor& tokens) {
  const torch::NoGradGuard no_grad;
  const Tensor row = tokens.flatten().remainder(patterns.front().tokens());
  bool follows = true;
  ForwardOptions options;
  options.on_ffn = [&](int layer, const Tensor& x, const FfnWeights& weights) {
    const Tensor expected =
        dense_pattern(pattern_of(patterns, layer)).to(x.device()).index_select(0, row);
    follows = follows && torch::linear(x, weights.gate).gt(0).equal(expected);
  };
  model.forward(tokens, options);
  return follows;
}

Tensor patterned_tokens(std::int64_t distinct, std::int64_t batch, std::int64_t length,
                        std::int64_t number) {
  const Tensor start = (torch::arange(batch, torch::kInt64) * distinct).floor_divide(batch);
  const Tensor place = torch::arange(length, torch::kInt64);
  return (start.unsqueeze(1) + place + number).remainder(distinct);
}

}  // namespace twell::app
