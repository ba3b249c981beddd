#include "app/model/sample.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "app/error.h"

namespace twell::app {

using torch::Tensor;

Sampler::Sampler(const SampleOptions& options)
    : options_(options), generator_(at::make_generator<at::CPUGeneratorImpl>(options.seed)) {}

int64_t Sampler::draw(const Tensor& logits) {
  const Tensor scores = logits.to(torch::TensorOptions(torch::kCPU).dtype(torch::kFloat64));
  if (scores.isnan().any().item<bool>()) throw Error("the model's logits are not numbers (NaN)");
  if (options_.temperature == 0) return scores.argmax().item<int64_t>();
  const int64_t kept =
      options_.top_k > 0 ? std::min(options_.top_k, scores.size(0)) : scores.size(0);
  const auto [best, ids] = scores.topk(kept);  // falling
  Tensor p = torch::softmax((best - best[0]) / options_.temperature, 0);
  // A token stays if those before it do not reach top_p; so the first always does.
  p = p.masked_fill(p.cumsum(0).sub(p).ge(options_.top_p), 0);
  p[0] = std::max(p[0].item<double>(), 1e-300);  // top_p 0: the likeliest alone
  return ids[torch::multinomial(p, 1, false, generator_)[0]].item<int64_t>();
}

}  // namespace twell::app
