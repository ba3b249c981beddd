#include "app/train/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "app/error.h"
#include "app/train/loss.h"
#include "app/util/transfer.h"

namespace twell::app {
namespace {

using torch::Tensor;

// Windows [count, length + 1] of the stream, `context` tokens apart.
Tensor windows(const TokenStream& stream, int64_t first, int64_t count, int64_t context,
               int64_t length) {
  Tensor tokens = torch::empty({count, length + 1}, torch::kInt64);
  auto* out = tokens.mutable_data_ptr<int64_t>();
  for (int64_t window = 0; window < count; ++window) {
    for (int64_t i = 0; i <= length; ++i) *out++ = stream[first + window * context + i];
  }
  return tokens;
}

}  // namespace

double Evaluation::perplexity() const { return std::exp(loss); }

double Evaluation::active() const {
  double sum = 0;
  for (const LayerActivity& layer : layers) sum += layer.active;
  return layers.empty() ? 0 : sum / static_cast<double>(layers.size());
}

Evaluation evaluate(Llama& model, const TokenStream& stream, const EvaluationOptions& options) {
  if (stream.size() < 2) throw Error("the evaluation data has fewer than two tokens");
  const torch::InferenceMode inference;
  const auto start = std::chrono::steady_clock::now();
  const int64_t all = stream.size() - 1;
  const int64_t total = options.max_tokens > 0 ? std::min(options.max_tokens, all) : all;
  const auto layers = static_cast<size_t>(model.config().num_hidden_layers);

  Evaluation result;
  std::vector<Tensor> activity(layers);
  std::vector<FfnOutput> outputs;
  Tensor sum = torch::zeros({}, torch::TensorOptions(model.device()).dtype(torch::kFloat64));
  while (result.tokens < total) {
    const int64_t left = total - result.tokens;
    const int64_t length = std::min(options.context, left);
    const int64_t count = std::clamp<int64_t>(left / length, 1, options.batch);
    const Tensor tokens = upload(windows(stream, result.tokens, count, options.context, length),
                                 model.device());  // [count, length + 1]
    ForwardOptions forward;
    forward.ffn = options.ffn;
    forward.ffn_outputs = &outputs;
    outputs.clear();
    const Tensor hidden = model.forward(tokens.narrow(1, 0, length), forward);
    const Tensor targets = tokens.narrow(1, 1, length).reshape({-1});
    const Tensor loss =
        linear_cross_entropy(hidden.reshape({targets.size(0), -1}), model.head(), targets);
    sum += loss.to(torch::kFloat64) * targets.size(0);
    result.tokens += targets.size(0);
    result.paths.clear();
    for (size_t layer = 0; layer < outputs.size(); ++layer) {
      const Tensor counts = outputs[layer].activity.to(torch::kInt64);
      activity[layer] = activity[layer].defined() ? activity[layer] + counts : counts;
      result.paths.push_back(outputs[layer].path);
    }
    if (options.progress) {
      options.progress(static_cast<double>(result.tokens) / static_cast<double>(total));
    }
  }
  result.loss = sum.item<double>() / static_cast<double>(result.tokens);
  for (const Tensor& counts : activity) {
    if (!counts.defined()) continue;
    result.layers.push_back({counts.sum().item<double>() / static_cast<double>(result.tokens),
                             counts.eq(0).sum().item<int64_t>(), counts});
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

double unigram_loss(const TokenStream& train, const TokenStream& heldout, int64_t tokens,
                    int64_t vocabulary) {
  std::vector<double> counts(static_cast<size_t>(vocabulary), 1.0);
  for (int64_t i = 0; i < train.size(); ++i) ++counts[static_cast<size_t>(train[i])];
  const double total = static_cast<double>(train.size() + vocabulary);
  double sum = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    sum -= std::log(counts[static_cast<size_t>(heldout[i])] / total);
  }
  return sum / static_cast<double>(tokens);
}

}  // namespace twell::app
