#pragma once
// What the tests of the CUDA backward share.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cuda/layout.h"
#include "forward_call.h"

namespace twell {

// A block with exact sums, and the gradients of its outputs: grad_y's elements are multiples of
// 1/16 too.
struct TrainingBlock : Block {
  std::vector<bf16> grad_y;
  float grad_l1 = 0.25f;

  TrainingBlock(FfnKind kind, std::int64_t tokens, std::int64_t hidden, std::int64_t neurons,
                double density)
      : Block(kind, tokens, hidden, neurons, density) {
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    grad_y.resize(x.size());
    for (bf16& v : grad_y) v = to_bf16(normal(random));
    snap(grad_y, 16);
    make_sums_exact();
  }

  // All elements become -1, 0 or 1: where sums are small, only the gradients themselves are
  // rounded.
  void make_small() {
    std::mt19937_64 random(11);
    for (std::vector<bf16>* values : {&x, &gate, &up, &down, &grad_y}) {
      for (bf16& v : *values) v = to_bf16(static_cast<float>(random() % 3) - 1);
    }
    grad_l1 = 1;
  }
};

struct Gradients {
  std::vector<double> x, gate, up, down;

  // What those of the weights become if they are added to `old`, if there is one.
  template <class Round>
  Gradients added_to(const std::vector<bf16>& old, const Round& round) const {
    Gradients sums = *this;
    for (std::vector<double>* sum : {&sums.gate, &sums.up, &sums.down}) {
      for (std::size_t i = 0; i < std::min(old.size(), sum->size()); ++i) {
        (*sum)[i] = round((*sum)[i] + to_float(old[i]));
      }
    }
    return sums;
  }
};

inline double no_rounding(double value) { return value; }
inline double to_nearest_bf16(double value) { return to_float(to_bf16(static_cast<float>(value))); }

// The dense block's backward, from g in bf16. `round` is applied wherever PyTorch's autograd stores
// a tensor.
template <class Round>
Gradients dense_gradients(const TrainingBlock& block, const Round& round) {
  const auto [kind, dtype, tokens, hidden, neurons] = block.problem;
  const auto rounded = [&](std::vector<double> values) {
#pragma omp parallel for
    for (double& v : values) v = round(v);
    return values;
  };
  // Sums over hidden, over neurons, over tokens.
  const auto to_neurons = [&](const std::vector<bf16>& rows, const std::vector<bf16>& weights) {
    return rounded(
        product(widen(rows), transposed(widen(weights), neurons, hidden), tokens, neurons, hidden));
  };
  const auto to_hidden = [&](const std::vector<double>& rows, const std::vector<bf16>& weights) {
    return rounded(product(rows, widen(weights), tokens, hidden, neurons));
  };
  const auto to_weights = [&](const std::vector<double>& rows, const std::vector<bf16>& inputs) {
    return rounded(
        product(transposed(rows, tokens, neurons), widen(inputs), neurons, hidden, tokens));
  };
  const bool gated = block.gated();
  const std::vector<double> g = block.gate_values();
  const std::vector<double> u =
      gated ? to_neurons(block.x, block.up) : std::vector<double>(g.size(), 1);
  const std::vector<double> sums = to_neurons(block.grad_y, block.down);
  std::vector<double> h(g.size()), dg(g.size()), du(g.size());
#pragma omp parallel for
  for (std::size_t i = 0; i < g.size(); ++i) {
    h[i] = round(g[i] * u[i]);
    const double of_l1 = round(block.grad_l1 * ((h[i] > 0) - (h[i] < 0)));
    const double dh = round(sums[i] + of_l1);
    dg[i] = g[i] <= 0 ? 0 : round(dh * u[i]);
    du[i] = round(dh * g[i]);
  }
  Gradients out;
  out.down = to_weights(h, block.grad_y);
  if (!gated) {
    out.x = to_hidden(dg, block.up);
    out.up = to_weights(dg, block.x);
    return out;
  }
  out.x = to_hidden(dg, block.gate);
  const std::vector<double> through_up = to_hidden(du, block.up);
  for (std::size_t i = 0; i < out.x.size(); ++i) out.x[i] = round(out.x[i] + through_up[i]);
  out.gate = to_weights(dg, block.x);
  out.up = to_weights(du, block.x);
  return out;
}

// Room for the columns that the forward keeps (cuda::kSavedShare): as the planner has it, and
// enough for all neurons of every tile, padded too.
constexpr double kAsPlanned = -1, kKeepAll = 9;

inline FfnPlan training_plan(const FfnProblem& problem, const Device& device, int chunk_tokens = 0,
                             double saved_share = kAsPlanned) {
  FfnPlan plan = sparse_plan(problem, device, true);
  if (saved_share >= 0) plan.saved_bytes = cuda::SavedLayout::bytes(problem, saved_share);
  if (chunk_tokens > 0) {
    plan.chunk_tokens = chunk_tokens;
    plan.workspace_bytes = cuda::ForwardLayout(plan).bytes;
    plan.backward_workspace_bytes = cuda::BackwardLayout(plan).bytes;
  }
  return plan;
}

// A block's training step on the device, with poisoned outputs, workspaces and saved tensors.
struct TrainingCall {
  Call forward;
  DeviceBuffer saved, grad_y, grad_l1, grad_x, grad_gate, grad_up, grad_down, workspace;
  bool accumulate = false;

  TrainingCall(const FfnPlan& plan, const TrainingBlock& block)
      : forward(plan, block),
        saved(plan.saved_bytes),
        grad_y(block.grad_y),
        grad_l1(std::vector<float>{block.grad_l1}),
        grad_x(block.x.size() * sizeof(bf16)),
        grad_gate(block.gate.size() * sizeof(bf16)),
        grad_up(block.up.size() * sizeof(bf16)),
        grad_down(block.down.size() * sizeof(bf16)),
        workspace(plan.backward_workspace_bytes) {}

  // Another block of the same shape.
  void upload(const TrainingBlock& block) {
    forward.upload(block);
    grad_y.upload(block.grad_y);
    grad_l1.upload(std::vector<float>{block.grad_l1});
  }

  void poison(cudaStream_t stream = nullptr) {
    forward.poison(stream);
    for (DeviceBuffer* buffer : {&saved, &grad_x, &grad_gate, &grad_up, &grad_down, &workspace}) {
      buffer->poison(stream);
    }
  }

  // Adds the gradients of the weights to `old`, if there is one.
  void accumulate_into(const std::vector<bf16>& old) {
    accumulate = !old.empty();
    if (forward.plan.problem.kind == FfnKind::kGated) grad_gate.upload(old);
    grad_up.upload(old);
    grad_down.upload(old);
  }

  FfnBackwardArgs arguments(cudaStream_t stream = nullptr) const {
    const bool gated = forward.plan.problem.kind == FfnKind::kGated;
    FfnBackwardArgs args;
    args.grad_y = grad_y.as();
    args.grad_l1 = grad_l1.as();
    args.x = forward.x.as();
    args.weights = forward.weights();
    args.saved = saved.as();
    args.grad_x = grad_x.as();
    args.grad_gate = gated ? grad_gate.as() : nullptr;
    args.grad_up = grad_up.as();
    args.grad_down = grad_down.as();
    args.accumulate = accumulate;
    args.workspace = workspace.as();
    args.stream = stream;
    return args;
  }

  Status run(cudaStream_t stream = nullptr) {
    const Status status = forward.run(stream, saved.as());
    return status.ok() ? ffn_backward(forward.plan, arguments(stream)) : status;
  }

  // Their bits, in the order x, gate, up, down.
  std::vector<std::vector<std::uint16_t>> gradients() const {
    return {grad_x.download<std::uint16_t>(), grad_gate.download<std::uint16_t>(),
            grad_up.download<std::uint16_t>(), grad_down.download<std::uint16_t>()};
  }

  void expect_guards_intact() const {
    for (const DeviceBuffer* buffer : {&forward.y, &forward.workspace, &saved, &grad_y, &grad_l1,
                                       &grad_x, &grad_gate, &grad_up, &grad_down, &workspace}) {
      EXPECT_TRUE(buffer->guard_intact());
    }
  }
};

// On Hopper, the lists' entries after a pass: none if it was dense.
inline int list_entries(const TrainingCall& call) {
  const cuda::BackwardLayout layout(call.forward.plan);
  return call.workspace.download<std::int32_t>()[layout.list_state / 4];
}

// Whether a pass with so many active (token, neuron) pairs has lists: on Hopper, if they have room.
inline bool has_lists(const FfnPlan& plan, std::int64_t active) {
  return cuda::is_hopper(plan.device) && active <= cuda::BackwardLayout(plan).entries;
}

// That the pass which has run kept to it.
inline void expect_lists(const TrainingCall& call, std::int64_t active) {
  const FfnPlan& plan = call.forward.plan;
  if (!cuda::is_hopper(plan.device) || plan.problem.tokens == 0) return;
  EXPECT_EQ(list_entries(call), has_lists(plan, active) ? active : 0);
}

class CudaBackward : public GpuTest {
 protected:
  // The gradients, added to `old`, against float64, and against the error of PyTorch's.
  void check(const TrainingBlock& block, const std::string& name, int chunk_tokens = 0,
             double saved_share = kAsPlanned, const std::vector<bf16>& old = {}) {
    const Gradients exact = dense_gradients(block, no_rounding).added_to(old, no_rounding);
    const Gradients pytorch =
        dense_gradients(block, to_nearest_bf16).added_to(old, to_nearest_bf16);
    const std::int64_t active = block.active_pairs();
    for (const Device& device : devices) {
      SCOPED_TRACE(name + " as sm_" + std::to_string(device.compute_capability));
      TrainingCall call(training_plan(block.problem, device, chunk_tokens, saved_share), block);
      call.accumulate_into(old);
      const Status status = call.run();
      ASSERT_TRUE(status.ok()) << status.message();
      require_cuda(cudaDeviceSynchronize());
      const std::int64_t hidden = block.problem.hidden;
      expect_close("x", call.grad_x, exact.x, pytorch.x, hidden, {});
      if (block.gated()) {
        expect_close("gate", call.grad_gate, exact.gate, pytorch.gate, hidden, old);
      }
      expect_close("up", call.grad_up, exact.up, pytorch.up, hidden, old);
      expect_close("down", call.grad_down, exact.down, pytorch.down, hidden, old);
      expect_lists(call, active);
      call.expect_guards_intact();
    }
  }

  // Where all sums are exact and only the gradients themselves are rounded, they are the nearest
  // bf16, in chunks or not, added to `old` or not.
  void check_exact(const FfnProblem& problem, int chunk_tokens = 0, double saved_share = kAsPlanned,
                   const std::vector<bf16>& old = {}) {
    TrainingBlock block(problem.kind, problem.tokens, problem.hidden, problem.neurons, 0.5);
    block.make_small();
    const Gradients exact = dense_gradients(block, no_rounding).added_to(old, no_rounding);
    const std::int64_t active = block.active_pairs();
    for (const Device& device : devices) {
      SCOPED_TRACE(name_of(problem, 0.5) + " as sm_" + std::to_string(device.compute_capability) +
                   " in chunks of " + std::to_string(chunk_tokens));
      TrainingCall call(training_plan(problem, device, chunk_tokens, saved_share), block);
      call.accumulate_into(old);
      ASSERT_TRUE(call.run().ok());
      expect_nearest("x", call.grad_x, exact.x);
      expect_nearest("gate", call.grad_gate, exact.gate);
      expect_nearest("up", call.grad_up, exact.up);
      expect_nearest("down", call.grad_down, exact.down);
      expect_lists(call, active);
    }
  }

 private:
  static void expect_nearest(const char* name, const DeviceBuffer& buffer,
                             const std::vector<double>& exact) {
    const std::vector<bf16> got = buffer.download<bf16>();
    for (std::size_t i = 0; i < exact.size(); ++i) {
      ASSERT_EQ(to_float(got[i]), to_nearest_bf16(exact[i])) << "grad_" << name << " element " << i;
    }
  }

  // A row that is 0 in both, of a token or neuron that takes no part, must be 0; elsewhere a 0 can
  // come of terms that cancel, and only the error counts. So with a row of `old`, instead of 0.
  static void expect_close(const char* name, const DeviceBuffer& buffer,
                           const std::vector<double>& exact, const std::vector<double>& pytorch,
                           std::int64_t hidden, const std::vector<bf16>& old) {
    const auto start = [&](std::size_t i) { return old.empty() ? 0.0 : to_float(old[i]); };
    const std::vector<bf16> got = buffer.download<bf16>();
    double error = 0, allowed = 0;
    for (std::size_t row = 0; row < exact.size(); row += hidden) {
      bool unchanged = true;
      for (std::size_t i = row; i < row + hidden; ++i) {
        const double value = to_float(got[i]);
        unchanged &= exact[i] == start(i) && pytorch[i] == start(i);
        error += (value - exact[i]) * (value - exact[i]);
        allowed += (pytorch[i] - exact[i]) * (pytorch[i] - exact[i]);
      }
      for (std::size_t i = row; unchanged && i < row + hidden; ++i) {
        ASSERT_EQ(to_float(got[i]), start(i)) << "grad_" << name << " element " << i;
      }
    }
    EXPECT_LE(std::sqrt(error), 1.1 * std::sqrt(allowed)) << "grad_" << name;
  }
};

}  // namespace twell
