#include "app/model/decoder.h"

#include <algorithm>

#include "app/error.h"

namespace twell::app {
namespace {

// A graph's attention reads the whole capacity of the cache, so that capacity doubles from here: a
// handful of captures, and never more than twice the keys.
constexpr int64_t kMinGraphCapacity = 256;

}  // namespace

using torch::Tensor;

Decoder::Decoder(Llama& model, FfnMode ffn, int64_t max_length)
    : model_(model), cache_(max_length) {
  options_.ffn = ffn;
  options_.cache = &cache_;
}

Tensor Decoder::prefill(const Tensor& prompt) {
  const Tensor hidden = model_.forward(prompt.unsqueeze(0).to(model_.device()), options_);
  return model_.logits(hidden[0][-1]);
}

Tensor Decoder::step(int64_t token) {
  if (!model_.device().is_cuda()) return prefill(torch::tensor({token}, torch::kInt64));
  if (cache_.length >= cache_.max_length) {
    throw Error("the cache holds " + std::to_string(cache_.max_length) + " tokens, and " +
                std::to_string(cache_.length + 1) + " were given");
  }
  if (!graph_ || cache_.length >= cache_.capacity()) capture();
  token_.fill_(token);
  cache_.slot.fill_(cache_.length);
  graph_->replay();
  ++cache_.length;
  return logits_;
}

void Decoder::capture() {
  graph_.reset();
  const int64_t capacity = std::max(kMinGraphCapacity, 2 * cache_.length);
  model_.reserve(cache_, std::min(cache_.max_length, capacity));
  const auto ints = torch::TensorOptions(model_.device()).dtype(torch::kInt64);
  token_ = torch::zeros({1, 1}, ints);
  // The captured step runs on the free slot too, whose keys the first real step overwrites.
  cache_.slot = torch::full({1}, cache_.length, ints);
  graph_ = std::make_unique<StepGraph>(
      [&] { logits_ = model_.logits(model_.forward(token_, options_)[0][-1]); });
}

}  // namespace twell::app
