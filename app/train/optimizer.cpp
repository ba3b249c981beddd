#include "app/train/optimizer.h"

namespace twell::app {

using torch::Tensor;

AdamW::AdamW(const std::map<std::string, Tensor>& parameters, const AdamWOptions& options)
    : options_(options), groups_{{options.weight_decay, {}, {}, {}, {}}, {0, {}, {}, {}, {}}} {
  step_count_ = torch::zeros({}, parameters.begin()->second.options().dtype(torch::kFloat32));
  for (const auto& [name, parameter] : parameters) {
    Group& group = groups_[parameter.dim() > 1 ? 0 : 1];
    group.names.push_back(name);
    group.parameters.push_back(parameter);
    group.m.push_back(torch::zeros_like(parameter));
    group.v.push_back(torch::zeros_like(parameter));
  }
}

Tensor AdamW::step(double learning_rate) {
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> all;
  for (const Group& group : groups_) {
    for (const Tensor& parameter : group.parameters) all.push_back(parameter.grad());
  }
  const Tensor norm = torch::stack(torch::_foreach_norm(all)).norm();
  const Tensor broken = norm.isfinite().logical_not().to(torch::kFloat32);  // 1: update nothing
  // The fused kernel divides the gradients by this.
  const Tensor divisor =
      options_.clip > 0 ? (norm / options_.clip).clamp_min(1) : torch::ones_like(norm);
  step_count_.fill_(static_cast<double>(++steps_));
  for (Group& group : groups_) {
    std::vector<Tensor> gradients;
    for (Tensor& parameter : group.parameters) {
      gradients.push_back(parameter.grad());
      parameter.mutable_grad().reset();
    }
    const std::vector<Tensor> counts(gradients.size(), step_count_);
    torch::_fused_adamw_(group.parameters, gradients, group.m, group.v, {}, counts, learning_rate,
                         options_.beta1, options_.beta2, group.weight_decay, options_.epsilon,
                         false, false, divisor, broken);
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
