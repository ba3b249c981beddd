#pragma once
// What the tests of the CUDA forward share.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "core/support.h"
#include "cuda/layout.h"
#include "support.h"

namespace twell {

// A block on the device, with poisoned outputs and workspace.
struct Call {
  FfnPlan plan;
  DeviceBuffer x, gate, up, down, y, l0, l1, activity, workspace;

  Call(const FfnPlan& p, const Block& block)
      : plan(p),
        x(block.x),
        gate(block.gate),
        up(block.up),
        down(block.down),
        y(block.x.size() * sizeof(bf16)),
        l0(8),
        l1(4),
        activity(block.problem.neurons * 4),
        workspace(p.workspace_bytes) {}

  // Another block of the same shape.
  void upload(const Block& block) {
    x.upload(block.x);
    gate.upload(block.gate);
    up.upload(block.up);
    down.upload(block.down);
  }

  void poison(cudaStream_t stream = nullptr) {
    for (DeviceBuffer* buffer : {&y, &l0, &l1, &activity, &workspace}) buffer->poison(stream);
  }

  FfnWeights weights() const {
    return {plan.problem.kind == FfnKind::kGated ? gate.as() : nullptr, up.as(), down.as()};
  }

  Status run(cudaStream_t stream = nullptr, void* saved = nullptr) {
    FfnForwardArgs args;
    args.x = x.as();
    args.weights = weights();
    args.y = y.as();
    args.stats = {l0.as<std::int64_t>(), l1.as(), activity.as<std::int32_t>()};
    args.saved = saved;
    args.workspace = workspace.as();
    args.stream = stream;
    return ffn_forward(plan, args);
  }
};

inline FfnPlan sparse_plan(const FfnProblem& problem, const Device& device, int chunk_tokens = 0) {
  FfnPlan plan = sparse_plan(problem, device, false);
  if (chunk_tokens > 0) {
    plan.chunk_tokens = chunk_tokens;
    plan.workspace_bytes = cuda::ForwardLayout(plan).bytes;
  }
  return plan;
}

// Of the elements from `first` to `end`.
inline double relative_error(const std::vector<bf16>& got, const std::vector<double>& want,
                             std::size_t first, std::size_t end) {
  double difference = 0, norm = 0;
  for (std::size_t i = first; i < end; ++i) {
    const double d = to_float(got[i]) - want[i];
    difference += d * d;
    norm += want[i] * want[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

inline double relative_error(const std::vector<bf16>& got, const std::vector<double>& want) {
  return relative_error(got, want, 0, want.size());
}

// Two roundings, of h and of y, each uniform in half a bf16 unit: 2^-9 sqrt(2) at most in the mean
// over many values, 2^-8 each in the worst case of few.
constexpr double kManyTolerance = 0.0027, kFewTolerance = 0.0078;
constexpr double tolerance_of(std::size_t values) {
  return values > 1000 ? kManyTolerance : kFewTolerance;
}

// What a forward writes.
struct Outputs {
  std::vector<bf16> y;
  std::int64_t l0 = -1;
  float l1 = -1;
  std::vector<std::int32_t> activity;
};

// Of the CPU's kernels, an implementation that shares none with the GPU's.
inline Outputs outputs_on_cpu(const Block& block) {
  const FfnPlan plan = sparse_plan(block.problem, cpu_device(2), false);
  Outputs out;
  out.y.resize(block.x.size());
  out.activity.resize(block.problem.neurons, -1);
  Buffer workspace(plan.workspace_bytes);
  FfnForwardArgs args;
  args.x = block.x.data();
  args.weights = {block.gated() ? block.gate.data() : nullptr, block.up.data(), block.down.data()};
  args.y = out.y.data();
  args.stats = {&out.l0, &out.l1, out.activity.data()};
  args.workspace = workspace.data();
  const Status status = ffn_forward(plan, args);
  EXPECT_TRUE(status.ok()) << status.message();
  return out;
}

class CudaForward : public GpuTest {
 protected:
  // Everything that the forward writes, against float64 and, if the block is small, against the
  // CPU's kernels.
  void check(const Block& block, const std::string& name, int chunk_tokens = 0) {
    const Expected want(block);
    for (const Device& device : devices) {
      SCOPED_TRACE(name + " as sm_" + std::to_string(device.compute_capability));
      check_on(device, block, chunk_tokens, want);
    }
  }

 private:
  static constexpr std::int64_t kSmallProduct = 1 << 24;  // multiplications

  struct Expected {
    std::vector<double> y;
    std::vector<std::int64_t> activity;
    std::int64_t l0 = 0;
    double l1 = 0;
    // The most active pairs that may be silent and silent ones that may be active: where sums are
    // not exact, those of float32 may fall on the other side of zero than those of float64.
    double disagreements;
    std::optional<Outputs> on_cpu;

    explicit Expected(const Block& block) {
      const auto [kind, dtype, tokens, hidden, neurons] = block.problem;
      const std::vector<double> g = block.gate_values();
      const std::vector<double> h = block.hidden_values(g);
      y = block.output(h);
      activity.resize(neurons);
      for (std::size_t i = 0; i < g.size(); ++i) {
        activity[i % neurons] += g[i] > 0;
        l0 += g[i] > 0;
        l1 += std::abs(h[i]);
      }
      disagreements = block.has_exact_sums ? 0 : 1e-4 * static_cast<double>(g.size()) + 0.5;
      if (tokens * hidden * neurons <= kSmallProduct) on_cpu = outputs_on_cpu(block);
    }
  };

  static void check_on(const Device& device, const Block& block, int chunk_tokens,
                       const Expected& want) {
    Call call(sparse_plan(block.problem, device, chunk_tokens), block);
    const Status status = call.run();
    ASSERT_TRUE(status.ok()) << status.message();
    require_cuda(cudaDeviceSynchronize());
    for (const DeviceBuffer* buffer :
         {&call.y, &call.l0, &call.l1, &call.activity, &call.workspace}) {
      EXPECT_TRUE(buffer->guard_intact());
    }
    const Outputs got = {call.y.download<bf16>(), call.l0.download<std::int64_t>()[0],
                         call.l1.download<float>()[0], call.activity.download<std::int32_t>()};
    expect_close(block, got, want);
    if (!want.on_cpu) return;
    SCOPED_TRACE("on the CPU");
    expect_close(block, *want.on_cpu, want);
    EXPECT_LE(relative_error(got.y, widen(want.on_cpu->y)), 2 * tolerance_of(got.y.size()));
  }

  static void expect_close(const Block& block, const Outputs& got, const Expected& want) {
    const std::size_t values = want.y.size();
    EXPECT_LE(relative_error(got.y, want.y), tolerance_of(values));
    // Tile by tile, so that of many tokens no few go wrong unseen; few h may decide a tile.
    const std::size_t tile = cuda::kTileTokens * block.problem.hidden;
    for (std::size_t first = 0; first + tile <= values; first += tile) {
      EXPECT_LE(relative_error(got.y, want.y, first, first + tile), kFewTolerance)
          << "tokens from " << first / block.problem.hidden;
    }

    std::int64_t disagreements = 0;
    for (std::size_t n = 0; n < want.activity.size(); ++n) {
      disagreements += std::abs(want.activity[n] - got.activity[n]);
    }
    EXPECT_LE(disagreements, want.disagreements);
    EXPECT_LE(std::abs(got.l0 - want.l0), disagreements);
    // Errors of rounding h cancel, the more so the more terms there are; those of the sum remain.
    const double terms = static_cast<double>(std::max<std::int64_t>(want.l0, 1));
    const double l1_tolerance = std::min(1e-3, 1e-4 + 1e-2 / std::sqrt(terms));
    EXPECT_NEAR(got.l1, want.l1, l1_tolerance * want.l1 + 1e-6);
  }
};

inline std::string name_of(const FfnProblem& problem, double density) {
  return std::string(name_of(problem.kind)) + " tokens " + std::to_string(problem.tokens) +
         " hidden " + std::to_string(problem.hidden) + " neurons " +
         std::to_string(problem.neurons) + " density " + std::to_string(density);
}

}  // namespace twell
