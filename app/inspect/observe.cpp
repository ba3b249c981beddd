#include "app/inspect/observe.h"

#include <algorithm>

#include "app/error.h"

namespace twell::app {
namespace {

// Appends the rows of `active` [tokens, neurons] bool to `trace`, counting in rate.
void append(Trace& trace, const torch::Tensor& active) {
  const torch::Tensor rows = active.cpu().contiguous();
  const bool* cells = rows.const_data_ptr<bool>();
  std::vector<std::uint16_t> columns;
  for (std::int64_t token = 0; token < rows.size(0); ++token, cells += trace.neurons) {
    columns.clear();
    for (std::int64_t n = 0; n < trace.neurons; ++n) {
      if (!cells[n]) continue;
      columns.push_back(static_cast<std::uint16_t>(n));
      ++trace.rate[n];
    }
    trace.append(columns);
  }
}

}  // namespace

std::vector<Trace> observe(Llama& model, const TokenStream& stream, const ObserveOptions& options) {
  const torch::InferenceMode inference;
  const ModelConfig& config = model.config();
  if (!model.is_relu()) {
    throw Error("hidden_act is '" + config.hidden_act +
                "': such a model has no inactive neurons; 'relu' is permitted");
  }
  const std::int64_t usable = std::min(stream.size(), options.max_tokens);
  if (usable < 1) throw Error("the data gives no token to look at");
  const std::int64_t context = std::min(options.context, usable);

  std::vector<Trace> traces(config.num_hidden_layers);
  for (std::size_t layer = 0; layer < traces.size(); ++layer) {
    traces[layer].layer = static_cast<int>(layer);
    traces[layer].neurons = config.intermediate_size[static_cast<std::int64_t>(layer)];
    traces[layer].rate.assign(traces[layer].neurons, 0);
  }
  ForwardOptions forward;
  forward.on_ffn = [&](int layer, const torch::Tensor& x, const FfnWeights& weights) {
    append(traces[layer], torch::mm(x, weights.gate.t()).gt(0));
  };
  const std::int64_t windows = usable / context;
  for (std::int64_t w = 0; w < windows; ++w) {
    const torch::Tensor tokens = torch::empty({1, context}, torch::kInt64);
    for (std::int64_t i = 0; i < context; ++i) {
      tokens.data_ptr<std::int64_t>()[i] = stream[w * context + i];
    }
    model.forward(tokens.to(model.device()), forward);
    if (options.progress) options.progress(static_cast<double>(w + 1) / windows);
  }
  for (Trace& trace : traces) {
    for (float& rate : trace.rate) rate /= static_cast<float>(trace.tokens());
  }
  return traces;
}

}  // namespace twell::app
