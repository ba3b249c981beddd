// What bench/cuda_ffn.py calls: a plan and a forward pass without PyTorch's operators around them.

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

// A plan of the forced sparse path for bf16 on CUDA device 0, or null and a message; the caller
// frees it.
FfnPlan* twell_bench_plan(int gated, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                          char* message, int size) {
  const twell::Result<twell::Device> device = twell::cuda_device(0);
  if (!device.ok()) return fail(device.status(), message, size), nullptr;
  twell::PlanOptions options;
  options.path = FfnPath::kSparse;
  const twell::Result<FfnPlan> plan = twell::plan_ffn(
      {gated ? FfnKind::kGated : FfnKind::kPlain, twell::DType::kBf16, tokens, hidden, neurons},
      device.value(), options);
  if (!plan.ok()) return fail(plan.status(), message, size), nullptr;
  return new FfnPlan(plan.value());
}

void twell_bench_free(FfnPlan* plan) { delete plan; }

std::int64_t twell_bench_workspace_bytes(const FfnPlan* plan) {
  return static_cast<std::int64_t>(plan->workspace_bytes);
}

// 0, or 1 and a message.
int twell_bench_forward(const FfnPlan* plan, const void* x, const void* gate, const void* up,
                        const void* down, void* y, void* workspace, void* stream, char* message,
                        int size) {
  twell::FfnForwardArgs args;
  args.x = x;
  args.weights = {gate, up, down};
  args.y = y;
  args.workspace = workspace;
  args.stream = stream;
  const twell::Status status = twell::ffn_forward(*plan, args);
  return status.ok() ? 0 : fail(status, message, size);
}

}  // extern "C"
