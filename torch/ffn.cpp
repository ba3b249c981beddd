#include "twell/ffn.h"

#include <array>

#include "check.h"
#include "device.h"
#include "operators.h"

namespace twell::ops {
namespace {

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

  const auto require_weight = [&](const Argument& weight) {
    require_same_device(weight, x_argument);
    require_dtype(weight, x.scalar_type());
    require_shape(weight, std::array{problem.neurons, problem.hidden}, "[neurons, hidden]");
    require_contiguous(weight);
  };
  require_weight(up_argument);
  if (gate) require_weight({"gate", *gate});
  require_weight({"down", down});
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
  Tensor grad_gate = execution.empty({gate ? problem.neurons : 0, problem.hidden}, x.scalar_type());
  Tensor grad_up = execution.empty({problem.neurons, problem.hidden}, x.scalar_type());
  Tensor grad_down = execution.empty({problem.neurons, problem.hidden}, x.scalar_type());
  const Tensor workspace = execution.bytes(plan.backward_workspace_bytes);

  FfnBackwardArgs args;
  args.grad_y = grad_y.const_data_ptr();
  args.grad_l1 = grad_l1 ? grad_l1->const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  args.weights = weights_of(gate, up, down);
  args.saved = saved.const_data_ptr();
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_gate = gate ? grad_gate.mutable_data_ptr() : nullptr;
  args.grad_up = grad_up.mutable_data_ptr();
  args.grad_down = grad_down.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr();
  args.stream = execution.stream();
  require(twell::ffn_backward(plan, args));
  return {grad_x, grad_gate, grad_up, grad_down};
}

}  // namespace twell::ops
