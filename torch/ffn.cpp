#include "twell/ffn.h"

#include <array>
#include <string_view>

#include "check.h"
#include "device.h"
#include "operators.h"

namespace twell::ops {
namespace {

// A weight or its gradient: [N, K], contiguous, as x.
void require_weight(const Argument& weight, const FfnProblem& problem, const Tensor& x) {
  require_same_device(weight, {"x", x});
  require_dtype(weight, x.scalar_type());
  require_shape(weight, std::array{problem.neurons, problem.hidden}, "[neurons, hidden]");
  require_contiguous(weight);
}

// The one check of the arguments that forward and backward share: x [M, K] and weights [N, K],
// contiguous, of one dtype on one device. The planner checks the sizes themselves.
FfnProblem require_problem(const Tensor& x, const std::optional<Tensor>& gate, const Tensor& up,
                           const Tensor& down) {
  const Argument x_argument{"x", x};
  const Argument up_argument{"up", up};
  FfnProblem problem;
  problem.kind = gate ? FfnKind::kGated : FfnKind::kPlain;
  problem.dtype = require_core_dtype("x", x.scalar_type());
  require_dim(x_argument, 2);
  require_contiguous(x_argument);
  require_dim(up_argument, 2);
  problem.tokens = x.size(0);
  problem.hidden = x.size(1);
  problem.neurons = up.size(0);

  require_weight(up_argument, problem, x);
  if (gate) require_weight({"gate", *gate}, problem, x);
  require_weight({"down", down}, problem, x);
  return problem;
}

FfnPlan require_plan(const FfnProblem& problem, const Device& device, bool training) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  options.training = training;
  return require(plan_ffn(problem, device, options));
}

FfnWeights weights_of(const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down) {
  return {gate ? gate->const_data_ptr() : nullptr, up.const_data_ptr(), down.const_data_ptr()};
}

ScalarType l1_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// What both forms of the backward are given.
struct BackwardInputs {
  const Tensor& grad_y;
  const std::optional<Tensor>& grad_l1;
  const Tensor& x;
  const std::optional<Tensor>& gate;
  const Tensor& up;
  const Tensor& down;
  const Tensor& saved;
};

// The gradients of the weights: new tensors, or such as are added to.
struct WeightGradients {
  std::optional<Tensor> gate, up, down;
  bool accumulate = false;
};

// Checks the inputs, writes the gradients and returns that of x.
Tensor backward(const FfnProblem& problem, const Execution& execution, const BackwardInputs& inputs,
                const WeightGradients& gradients) {
  const auto& [grad_y, grad_l1, x, gate, up, down, saved] = inputs;
  const FfnPlan plan = require_plan(problem, execution.device(), /*training=*/true);

  const Argument x_argument{"x", x};
  const Argument grad_y_argument{"grad_y", grad_y};
  require_same_device(grad_y_argument, x_argument);
  require_dtype(grad_y_argument, x.scalar_type());
  require_shape(grad_y_argument, std::array{problem.tokens, problem.hidden}, "[tokens, hidden]");
  require_contiguous(grad_y_argument);
  if (grad_l1) {
    const Argument grad_l1_argument{"grad_l1", *grad_l1};
    require_same_device(grad_l1_argument, x_argument);
    require_dtype(grad_l1_argument, l1_dtype(problem.dtype));
    require_dim(grad_l1_argument, 0);
  }
  const Argument saved_argument{"saved", saved};
  require_same_device(saved_argument, x_argument);
  require_dtype(saved_argument, ScalarType::Byte);
  require_shape(saved_argument, std::array{static_cast<std::int64_t>(plan.saved_bytes)},
                "what ffn_forward returned with save=True for this x, [saved_bytes]");
  require_contiguous(saved_argument);

  Tensor grad_x = execution.empty({problem.tokens, problem.hidden}, x.scalar_type());
  const Tensor workspace = execution.bytes(plan.backward_workspace_bytes);
  const auto pointer = [](const std::optional<Tensor>& gradient) {
    return gradient ? gradient->mutable_data_ptr() : nullptr;
  };

  FfnBackwardArgs args;
  args.grad_y = grad_y.const_data_ptr();
  args.grad_l1 = grad_l1 ? grad_l1->const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  args.weights = weights_of(gate, up, down);
  args.saved = saved.const_data_ptr();
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_gate = pointer(gradients.gate);
  args.grad_up = pointer(gradients.up);
  args.grad_down = pointer(gradients.down);
  args.accumulate = gradients.accumulate;
  args.workspace = workspace.mutable_data_ptr();
  args.stream = execution.stream();
  require(twell::ffn_backward(plan, args));
  return grad_x;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ffn_forward(const Tensor& x,
                                                               const std::optional<Tensor>& gate,
                                                               const Tensor& up, const Tensor& down,
                                                               bool save, bool count) {
  const FfnProblem problem = require_problem(x, gate, up, down);
  const Execution execution(x);
  const FfnPlan plan = require_plan(problem, execution.device(), save);

  Tensor y = execution.empty({problem.tokens, problem.hidden}, x.scalar_type());
  const auto scalar = [&](ScalarType dtype) {
    return count ? execution.empty({}, dtype) : execution.empty({0}, dtype);
  };
  Tensor l0 = scalar(ScalarType::Long);
  Tensor l1 = scalar(l1_dtype(problem.dtype));
  Tensor activity = execution.empty({count ? problem.neurons : 0}, ScalarType::Int);
  Tensor saved = execution.bytes(plan.saved_bytes);
  const Tensor workspace = execution.bytes(plan.workspace_bytes);

  FfnForwardArgs args;
  args.x = x.const_data_ptr();
  args.weights = weights_of(gate, up, down);
  args.y = y.mutable_data_ptr();
  if (count) {
    args.stats.l0 = static_cast<std::int64_t*>(l0.mutable_data_ptr());
    args.stats.l1 = l1.mutable_data_ptr();
    args.stats.activity = static_cast<std::int32_t*>(activity.mutable_data_ptr());
  }
  args.saved = saved.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  args.stream = execution.stream();
  require(twell::ffn_forward(plan, args));
  return {y, l0, l1, activity, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_l1, const Tensor& x,
    const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down, const Tensor& saved) {
  const FfnProblem problem = require_problem(x, gate, up, down);
  const Execution execution(x);
  const auto gradient = [&](std::int64_t neurons) {
    return execution.empty({neurons, problem.hidden}, x.scalar_type());
  };
  WeightGradients gradients{std::nullopt, gradient(problem.neurons), gradient(problem.neurons)};
  if (gate) gradients.gate = gradient(problem.neurons);
  const Tensor grad_x =
      backward(problem, execution, {grad_y, grad_l1, x, gate, up, down, saved}, gradients);
  return {grad_x, gate ? *gradients.gate : gradient(0), *gradients.up, *gradients.down};
}

Tensor ffn_backward_accumulate(const Tensor& grad_y, const std::optional<Tensor>& grad_l1,
                               const Tensor& x, const std::optional<Tensor>& gate, const Tensor& up,
                               const Tensor& down, const Tensor& saved,
                               const std::optional<Tensor>& grad_gate,
                               const std::optional<Tensor>& grad_up,
                               const std::optional<Tensor>& grad_down) {
  const FfnProblem problem = require_problem(x, gate, up, down);
  const auto require_gradient = [&](std::string_view name, const std::optional<Tensor>& gradient) {
    if (gradient) require_weight({name, *gradient}, problem, x);
  };
  require_gradient("grad_gate", grad_gate);
  require_gradient("grad_up", grad_up);
  require_gradient("grad_down", grad_down);
  return backward(problem, Execution(x), {grad_y, grad_l1, x, gate, up, down, saved},
                  {grad_gate, grad_up, grad_down, /*accumulate=*/true});
}

}  // namespace twell::ops
