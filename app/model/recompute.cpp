#include "app/model/recompute.h"

#include <torch/custom_class.h>

#include <utility>

namespace twell::app {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Run = std::function<variable_list(const Tensor&)>;

// Lets a function travel in an autograd context.
struct Capsule : torch::CustomClassHolder {
  explicit Capsule(Run run) : run(std::move(run)) {}
  Run run;
};

// The outputs of run on a copy of x that is a leaf, with their graph.
variable_list with_graph(const Run& run, const Tensor& x) {
  const torch::AutoGradMode enable(true);
  return run(x);
}

struct Recompute : torch::autograd::Function<Recompute> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList parameters,
                               const c10::intrusive_ptr<Capsule>& capsule) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["run"] = c10::IValue::make_capsule(capsule);
    variable_list saved = {x};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    // With a graph, though it is dropped at once: so `run` does exactly what it does without this.
    variable_list outputs = with_graph(capsule->run, x.detach().requires_grad_());
    variable_list constant;
    for (Tensor& output : outputs) {
      const bool differentiable = output.requires_grad();
      output = output.detach();
      if (!differentiable) constant.push_back(output);
    }
    ctx->mark_non_differentiable(constant);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list inputs = ctx->get_saved_variables();  // x, then the parameters
    inputs[0] = inputs[0].detach().requires_grad_();
    const auto capsule = ctx->saved_data["run"].toCapsule();
    const variable_list all = with_graph(static_cast<Capsule&>(*capsule).run, inputs[0]);
    variable_list outputs, outer;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!grads[i].defined() || !all[i].requires_grad()) continue;
      outputs.push_back(all[i]);
      outer.push_back(grads[i]);
    }
    variable_list result(inputs.size());
    if (!outputs.empty()) {
      result = torch::autograd::grad(outputs, inputs, outer, /*retain_graph=*/std::nullopt,
                                     /*create_graph=*/false, /*allow_unused=*/true);
    }
    result.emplace_back();  // of `capsule`
    return result;
  }
};

}  // namespace

variable_list recompute(Run run, const Tensor& x, const std::vector<Tensor>& parameters) {
  if (!torch::GradMode::is_enabled()) return run(x);
  const auto capsule = c10::make_intrusive<Capsule>(std::move(run));
  return Recompute::apply(x, at::TensorList(parameters), capsule);
}

}  // namespace twell::app
