#include "app/train/revival.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <string>

namespace twell::app {

using torch::Tensor;

namespace {

int64_t neurons_of(const ModelConfig& config) {  // of all layers together
  int64_t sum = 0;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    sum += config.intermediate_size[layer];
  }
  return sum;
}

}  // namespace

Revival::Revival(int64_t after, uint64_t seed, const Llama& model)
    : after_(after),
      seed_(seed),
      idle_(torch::zeros({neurons_of(model.config())},
                         torch::TensorOptions(model.device()).dtype(torch::kInt32))) {}

std::vector<int64_t> Revival::step(int64_t step, const std::vector<Tensor>& activity, Llama& model,
                                   AdamW& optimizer) {
  std::vector<int64_t> revived(activity.size(), 0);
  if (after_ == 0) return revived;
  const torch::NoGradGuard no_grad;
  idle_.add_(1).mul_(torch::cat(activity).eq(0));
  // The device is not asked before there can be any, nor in every step.
  if (step < next_check_ || step % std::max<int64_t>(1, after_ / 16) != 0) return revived;
  // Drawn on the CPU, so that all devices draw alike. An odd multiplier gives each step its own
  // seed; the golden ratio's spreads them.
  auto random = at::make_generator<at::CPUGeneratorImpl>(seed_ ^ static_cast<uint64_t>(step) *
                                                                     0x9e3779b97f4a7c15u);
  const ModelConfig& config = model.config();
  int64_t first = 0;  // of the layer's neurons
  for (size_t layer = 0; layer < activity.size(); ++layer) {
    Tensor idle = idle_.narrow(0, first, activity[layer].size(0));
    first += activity[layer].size(0);
    const Tensor rows = idle.ge(after_).nonzero().flatten();
    revived[layer] = rows.size(0);
    if (rows.size(0) == 0) continue;
    const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
    Tensor gate = model.parameters().at(mlp + "gate_proj.weight");
    const Tensor fresh = torch::empty({rows.size(0), config.hidden_size}, torch::kFloat32)
                             .normal_(0, config.initializer_range, random);
    gate.index_copy_(0, rows, fresh.to(gate.options()));
    for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
      optimizer.forget_rows(mlp + name + ".weight", rows);
    }
    idle.index_fill_(0, rows, 0);
  }
  next_check_ = step + after_ - idle_.max().item<int64_t>();
  return revived;
}

}  // namespace twell::app
