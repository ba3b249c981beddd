// What bench/cuda_ffn*.py call: a plan, a forward and a backward pass and the gate that packs,
// without PyTorch's operators around them. Functions that can fail return 0, or 1 and a message.

#include <cstdint>
#include <cstdio>

#include "twell/ffn.h"
#include "twell/gate_pack.h"

using twell::FfnKind;
using twell::FfnPath;
using twell::FfnPlan;

namespace {

int fail(const twell::Status& status, char* message, int size) {
  std::snprintf(message, static_cast<std::size_t>(size), "%s", status.message().c_str());
  return 1;
}

// For a gated block in bf16 on CUDA device 0.
twell::Result<FfnPlan> plan(std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                            const twell::PlanOptions& options) {
  const twell::Result<twell::Device> device = twell::cuda_device(0);
  if (!device.ok()) return device.status();
  return twell::plan_ffn({FfnKind::kGated, twell::DType::kBf16, tokens, hidden, neurons},
                         device.value(), options);
}

}  // namespace

extern "C" {

// A plan of the forced sparse path, or null and a message; the caller frees it.
FfnPlan* twell_bench_plan(int training, std::int64_t tokens, std::int64_t hidden,
                          std::int64_t neurons, char* message, int size) {
  const twell::Result<FfnPlan> made =
      plan(tokens, hidden, neurons, {.path = FfnPath::kSparse, .training = training != 0});
  if (!made.ok()) return fail(made.status(), message, size), nullptr;
  return new FfnPlan(made.value());
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

// What the planner chooses by itself for a forward, or for forward and backward, of so many mean
// active neurons per token and per tile: whether the dense path, and the times it predicts.
int twell_bench_choice(int training, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                       double expected_active, double expected_union, int* dense, double* dense_ms,
                       double* sparse_ms, char* message, int size) {
  const twell::Result<FfnPlan> made = plan(tokens, hidden, neurons,
                                           {.training = training != 0,
                                            .expected_active = expected_active,
                                            .expected_union = expected_union});
  if (!made.ok()) return fail(made.status(), message, size);
  *dense = made->path == FfnPath::kDense;
  *dense_ms = made->predicted_dense_ms;
  *sparse_ms = made->predicted_sparse_ms;
  return 0;
}

// `saved` is null for a plan that is not for training.
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

// The bytes of gate_pack's words, in the published 32 slots, and of its workspace.
int twell_bench_gate_pack_bytes(std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                                std::int64_t* words, std::int64_t* workspace, char* message,
                                int size) {
  const twell::Result<twell::Device> device = twell::cuda_device(0);
  if (!device.ok()) return fail(device.status(), message, size);
  const twell::TwellShape shape = {tokens, neurons};
  const auto bytes = twell::gate_pack_workspace_bytes(shape, hidden, device.value());
  if (!bytes.ok()) return fail(bytes.status(), message, size);
  *words = shape.words() * static_cast<std::int64_t>(sizeof(std::uint32_t));
  *workspace = static_cast<std::int64_t>(bytes.value());
  return 0;
}

int twell_bench_gate_pack(std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                          const void* x, const void* gate, void* words, void* overflow_tile_rows,
                          void* workspace, void* stream, char* message, int size) {
  const twell::Result<twell::Device> device = twell::cuda_device(0);
  if (!device.ok()) return fail(device.status(), message, size);
  twell::GatePackArgs args;
  args.x = static_cast<const twell::bf16*>(x);
  args.gate = static_cast<const twell::bf16*>(gate);
  args.hidden = hidden;
  args.words = static_cast<std::uint32_t*>(words);
  args.overflow_tile_rows = static_cast<std::int64_t*>(overflow_tile_rows);
  args.workspace = workspace;
  args.stream = stream;
  const twell::Status status = twell::gate_pack({tokens, neurons}, device.value(), args);
  return status.ok() ? 0 : fail(status, message, size);
}

}  // extern "C"
