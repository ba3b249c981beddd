// What bench/cuda_ffn*.py call: a plan, a forward and a backward pass without PyTorch's operators
// around them.

#include <cstdint>
#include <cstdio>

#include "twell/ffn.h"

using twell::FfnKind;
using twell::FfnPath;
using twell::FfnPlan;

namespace {

int fail(const twell::Status& status, char* message, int size) {
  std::snprintf(message, static_cast<std::size_t>(size), "%s", status.message().c_str());
  return 1;
}

}  // namespace

extern "C" {

// A plan of the forced sparse path for a gated block in bf16 on CUDA device 0, or null and a
// message; the caller frees it.
FfnPlan* twell_bench_plan(int training, std::int64_t tokens, std::int64_t hidden,
                          std::int64_t neurons, char* message, int size) {
  const twell::Result<twell::Device> device = twell::cuda_device(0);
  if (!device.ok()) return fail(device.status(), message, size), nullptr;
  twell::PlanOptions options;
  options.path = FfnPath::kSparse;
  options.training = training != 0;
  const twell::Result<FfnPlan> plan = twell::plan_ffn(
      {FfnKind::kGated, twell::DType::kBf16, tokens, hidden, neurons}, device.value(), options);
  if (!plan.ok()) return fail(plan.status(), message, size), nullptr;
  return new FfnPlan(plan.value());
}

void twell_bench_free(FfnPlan* plan) { delete plan; }

std::int64_t twell_bench_workspace_bytes(const FfnPlan* plan) {
  return static_cast<std::int64_t>(plan->workspace_bytes);
}

std::int64_t twell_bench_saved_bytes(const FfnPlan* plan) {
  return static_cast<std::int64_t>(plan->saved_bytes);
}

std::int64_t twell_bench_backward_workspace_bytes(const FfnPlan* plan) {
  return static_cast<std::int64_t>(plan->backward_workspace_bytes);
}

// 0, or 1 and a message. `saved` is null for a plan that is not for training.
int twell_bench_forward(const FfnPlan* plan, const void* x, const void* gate, const void* up,
                        const void* down, void* y, void* saved, void* workspace, void* stream,
                        char* message, int size) {
  twell::FfnForwardArgs args;
  args.x = x;
  args.weights = {gate, up, down};
  args.y = y;
  args.saved = saved;
  args.workspace = workspace;
  args.stream = stream;
  const twell::Status status = twell::ffn_forward(*plan, args);
  return status.ok() ? 0 : fail(status, message, size);
}

// The same for the backward; gradients as in FfnBackwardArgs.
int twell_bench_backward(const FfnPlan* plan, const void* grad_y, const void* x, const void* gate,
                         const void* up, const void* down, const void* saved, void* grad_x,
                         void* grad_gate, void* grad_up, void* grad_down, void* workspace,
                         void* stream, char* message, int size) {
  twell::FfnBackwardArgs args;
  args.grad_y = grad_y;
  args.x = x;
  args.weights = {gate, up, down};
  args.saved = saved;
  args.grad_x = grad_x;
  args.grad_gate = grad_gate;
  args.grad_up = grad_up;
  args.grad_down = grad_down;
  args.workspace = workspace;
  args.stream = stream;
  const twell::Status status = twell::ffn_backward(*plan, args);
  return status.ok() ? 0 : fail(status, message, size);
}

}  // extern "C"
