#pragma once
// What the tests of the CUDA forward share.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

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

  Status run(cudaStream_t stream = nullptr, void* saved = nullptr) {
    FfnForwardArgs args;
    args.x = x.as();
    args.weights = {plan.problem.kind == FfnKind::kGated ? gate.as() : nullptr, up.as(), down.as()};
    args.y = y.as();
    args.stats = {l0.as<std::int64_t>(), l1.as(), activity.as<std::int32_t>()};
    args.saved = saved;
    args.workspace = workspace.as();
    args.stream = stream;
    return ffn_forward(plan, args);
  }
};

inline FfnPlan sparse_plan(const FfnProblem& problem, const Device& device, int chunk_tokens = 0) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  const Result<FfnPlan> made = plan_ffn(problem, device, options);
  EXPECT_TRUE(made.ok()) << made.status().message();
  FfnPlan plan = made.value();
  if (chunk_tokens > 0) {
    plan.chunk_tokens = chunk_tokens;
    plan.workspace_bytes = cuda::ForwardLayout(plan).bytes;
  }
  return plan;
}

inline double relative_error(const std::vector<bf16>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double d = to_float(got[i]) - want[i];
    difference += d * d;
    norm += want[i] * want[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

class CudaForward : public GpuTest {
 protected:
  // Everything that the forward writes, against float64.
  void check(const Block& block, const std::string& name, int chunk_tokens = 0) {
    const std::vector<double> g = block.gate_values();
    const std::vector<double> h = block.hidden_values(g);
    const std::vector<double> y = block.output(h);
    for (const Device& device : devices) {
      SCOPED_TRACE(name + " as sm_" + std::to_string(device.compute_capability));
      check_on(device, block, chunk_tokens, g, h, y);
    }
  }

 private:
  void check_on(const Device& device, const Block& block, int chunk_tokens,
                const std::vector<double>& g, const std::vector<double>& h,
                const std::vector<double>& y) {
    Call call(sparse_plan(block.problem, device, chunk_tokens), block);
    const Status status = call.run();
    ASSERT_TRUE(status.ok()) << status.message();
    require_cuda(cudaDeviceSynchronize());

    // Two roundings, of h and of y, each uniform in half a bf16 unit: 2^-9 sqrt(2) at most in the
    // mean over many values, 2^-8 each in the worst case of few.
    const double kTolerance = block.x.size() > 1000 ? 0.0027 : 0.0078;
    EXPECT_LE(relative_error(call.y.download<bf16>(), y), kTolerance);
    for (const DeviceBuffer* buffer :
         {&call.y, &call.l0, &call.l1, &call.activity, &call.workspace}) {
      EXPECT_TRUE(buffer->guard_intact());
    }

    const std::vector<std::int32_t> activity = call.activity.download<std::int32_t>();
    std::int64_t pairs = 0, disagreements = 0;
    double sum = 0;
    for (std::int64_t n = 0; n < block.problem.neurons; ++n) {
      std::int64_t count = 0;
      for (std::int64_t t = 0; t < block.problem.tokens; ++t) {
        count += g[t * block.problem.neurons + n] > 0;
        sum += std::abs(h[t * block.problem.neurons + n]);
      }
      disagreements += std::abs(count - activity[n]);
      pairs += count;
    }
    // float32 sums may fall on the other side of zero than float64 ones.
    EXPECT_LE(disagreements, 1e-4 * static_cast<double>(g.size()) + 0.5);
    EXPECT_LE(std::abs(call.l0.download<std::int64_t>()[0] - pairs), disagreements);
    EXPECT_NEAR(call.l1.download<float>()[0], sum, 1e-3 * sum + 1e-6);
  }
};

inline std::string name_of(const FfnProblem& problem, double density) {
  return std::string(name_of(problem.kind)) + " tokens " + std::to_string(problem.tokens) +
         " hidden " + std::to_string(problem.hidden) + " neurons " +
         std::to_string(problem.neurons) + " density " + std::to_string(density);
}

}  // namespace twell
