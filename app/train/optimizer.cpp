#include "app/train/optimizer.h"

#include <algorithm>
#include <cmath>

namespace twell::app {

using torch::Tensor;

AdamW::AdamW(const std::map<std::string, Tensor>& parameters, const AdamWOptions& options)
    : options_(options),
      groups_{{options.weight_decay, {}, {}, {}, {}, {}}, {0, {}, {}, {}, {}, {}}} {
  for (const auto& [name, parameter] : parameters) {
    Group& group = groups_[parameter.dim() > 1 ? 0 : 1];
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.m.push_back(torch::zeros_like(parameter));
    group.v.push_back(torch::zeros_like(parameter));
    group.steps.push_back(torch::zeros({}, torch::kFloat32));
  }
}

double AdamW::step(double learning_rate) {
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> all;
  for (const Group& group : groups_) {
    for (const Tensor& parameter : group.parameters) all.push_back(parameter.grad());
  }
  const double norm = torch::stack(torch::_foreach_norm(all)).norm().item<double>();
  if (!std::isfinite(norm)) return norm;
  // The fused kernel divides the gradients by this.
  const double divisor = options_.clip > 0 ? std::max(1.0, norm / options_.clip) : 1.0;
  const Tensor scale = torch::full({}, divisor, all.front().options());
  ++steps_;
  for (Group& group : groups_) {
    std::vector<Tensor> gradients;
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      gradients.push_back(group.parameters[i].grad());
      group.steps[i].fill_(static_cast<double>(steps_));
      group.parameters[i].mutable_grad().reset();
    }
    torch::_fused_adamw_(group.parameters, gradients, group.m, group.v, {}, group.steps,
                         learning_rate, options_.beta1, options_.beta2, group.weight_decay,
                         options_.epsilon, false, false, scale);
  }
  return norm;
}

void AdamW::forget_rows(const std::string& name, const Tensor& rows) {
  for (Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      if (group.names[i] != name) continue;
      group.m[i].index_fill_(0, rows, 0);
      group.v[i].index_fill_(0, rows, 0);
    }
  }
}

std::map<std::string, Tensor> AdamW::state() const {
  std::map<std::string, Tensor> state;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      state["adam.m." + group.names[i]] = group.m[i];
      state["adam.v." + group.names[i]] = group.v[i];
    }
  }
  return state;
}

}  // namespace twell::app
