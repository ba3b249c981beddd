// The CUDA forward against a float64 oracle.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/layout.h"
#include "support.h"

namespace twell {
namespace {

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

  Status run(cudaStream_t stream = nullptr) {
    FfnForwardArgs args;
    args.x = x.as();
    args.weights = {plan.problem.kind == FfnKind::kGated ? gate.as() : nullptr, up.as(), down.as()};
    args.y = y.as();
    args.stats = {l0.as<std::int64_t>(), l1.as(), activity.as<std::int32_t>()};
    args.workspace = workspace.as();
    args.stream = stream;
    return ffn_forward(plan, args);
  }
};

FfnPlan sparse_plan(const FfnProblem& problem, const Device& device, int chunk_tokens = 0) {
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

double relative_error(const std::vector<bf16>& got, const std::vector<double>& want) {
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
  void check(const Block& block, const std::string& name, int chunk_tokens = 0) {
    SCOPED_TRACE(name);
    Call call(sparse_plan(block.problem, device, chunk_tokens), block);
    const Status status = call.run();
    ASSERT_TRUE(status.ok()) << status.message();
    require_cuda(cudaDeviceSynchronize());

    // Two roundings, of h and of y, each uniform in half a bf16 unit: 2^-9 sqrt(2) at most in the
    // mean over many values, 2^-8 each in the worst case of few.
    const double kTolerance = block.x.size() > 1000 ? 0.0027 : 0.0078;
    const std::vector<double> want = block.output();
    EXPECT_LE(relative_error(call.y.download<bf16>(), want), kTolerance);
    for (const DeviceBuffer* buffer :
         {&call.y, &call.l0, &call.l1, &call.activity, &call.workspace}) {
      EXPECT_TRUE(buffer->guard_intact());
    }

    const std::vector<double> g = block.gate_values();
    const std::vector<double> h = block.hidden_values();
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

TEST_F(CudaForward, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const Size size : {Size{1, 64, 256},
                            {3, 8, 8},
                            {4, 2056, 264},
                            {16, 264, 4104},
                            {50, 136, 520},
                            {64, 64, 256},
                            {65, 64, 256},
                            {127, 72, 264},
                            {128, 8, 8},
                            {129, 200, 1000},
                            {300, 520, 1032}}) {
      for (const double density : {0.0, 0.005, 0.5, 1.0}) {
        check(Block(kind, size.tokens, size.hidden, size.neurons, density),
              std::string(name_of(kind)) + " tokens " + std::to_string(size.tokens) + " hidden " +
                  std::to_string(size.hidden) + " neurons " + std::to_string(size.neurons) +
                  " density " + std::to_string(density));
      }
    }
  }
}

TEST_F(CudaForward, MatchesFloat64InChunks) {
  check(Block(FfnKind::kGated, 1000, 136, 776, 0.02), "chunks of 128", 128);
  check(Block(FfnKind::kPlain, 1000, 136, 776, 0.02), "chunks of 384", 384);
}

TEST_F(CudaForward, TakesNoTokens) { check(Block(FfnKind::kGated, 0, 64, 256, 0.5), "none"); }

TEST_F(CudaForward, TakesOneHeavyTokenAmongEmptyOnes) {
  Block block(FfnKind::kGated, 200, 64, 1024, 0.0);
  block.x[77 * 64] = to_bf16(-8.0f);  // the bias, the other way round
  check(block, "heavy");
}

TEST_F(CudaForward, TakesActiveNeuronsInOneBlockOnly) {
  Block block(FfnKind::kGated, 200, 64, 1024, 0.0);
  for (std::int64_t n = 512; n < 768; ++n) block.gate[n * 64] = to_bf16(4.0f);
  check(block, "one block");
}

TEST_F(CudaForward, SpreadsNanAndInfinityAsDense) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const std::int64_t tokens : {40, 300}) {
      Block block(kind, tokens, 72, 520, 0.02);
      const float nan = std::numeric_limits<float>::quiet_NaN();
      const float infinity = std::numeric_limits<float>::infinity();
      block.x[3 * 72 + 5] = to_bf16(nan);
      block.x[tokens / 2 * 72 + 6] = to_bf16(infinity);
      block.x[(tokens - 1) * 72 + 7] = to_bf16(-infinity);
      Call call(sparse_plan(block.problem, device), block);
      ASSERT_TRUE(call.run().ok());
      const std::vector<bf16> got = call.y.download<bf16>();
      const std::vector<double> want = block.output();
      for (std::size_t i = 0; i < want.size(); ++i) {
        if (std::isnan(want[i])) {
          EXPECT_TRUE(std::isnan(to_float(got[i]))) << i;
        } else if (std::isinf(want[i])) {
          EXPECT_EQ(to_float(got[i]), want[i]) << i;
        } else {
          EXPECT_TRUE(std::isfinite(to_float(got[i]))) << i;
        }
      }
    }
  }
}

class CudaForwardOfTokens : public CudaForward, public ::testing::WithParamInterface<int> {};

INSTANTIATE_TEST_SUITE_P(FewAndMany, CudaForwardOfTokens, ::testing::Values(16, 300, 1500));

TEST_P(CudaForwardOfTokens, IsBitwiseReproducible) {
  const Block block(FfnKind::kGated, GetParam(), 264, 2056, 0.05);
  Call call(sparse_plan(block.problem, device), block);
  std::vector<bf16> first_y;
  std::vector<float> first_l1;
  for (int run = 0; run < 20; ++run) {
    call.y.poison();
    call.workspace.poison();
    ASSERT_TRUE(call.run().ok());
    const std::vector<bf16> y = call.y.download<bf16>();
    const std::vector<float> l1 = call.l1.download<float>();
    if (run == 0) {
      first_y = y;
      first_l1 = l1;
    }
    EXPECT_EQ(std::memcmp(y.data(), first_y.data(), y.size() * sizeof(bf16)), 0);
    EXPECT_EQ(l1, first_l1);
  }
}

TEST_P(CudaForwardOfTokens, ReplaysInAGraphWithChangingInputs) {
  const Block sparse(FfnKind::kGated, GetParam(), 136, 776, 0.01);
  const Block dense(FfnKind::kGated, GetParam(), 136, 776, 0.6);
  Call call(sparse_plan(sparse.problem, device), sparse);
  cudaStream_t stream;
  require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const Status status = call.run(stream);
  require_cuda(cudaStreamEndCapture(stream, &graph));
  ASSERT_TRUE(status.ok()) << status.message();
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (const Block* block : {&sparse, &dense, &sparse}) {
    call.x.upload(block->x);
    call.gate.upload(block->gate);
    call.up.upload(block->up);
    call.down.upload(block->down);
    call.y.poison();
    require_cuda(cudaDeviceSynchronize());
    require_cuda(cudaGraphLaunch(executable, stream));
    require_cuda(cudaStreamSynchronize(stream));
    EXPECT_LE(relative_error(call.y.download<bf16>(), block->output()), 0.0027);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(CudaForward, RefusesByName) {
  const Block block(FfnKind::kGated, 16, 64, 256, 0.5);
  Call call(sparse_plan(block.problem, device), block);
  FfnForwardArgs args;
  args.x = call.x.as<bf16>() + 1;
  args.weights = {call.gate.as(), call.up.as(), call.down.as()};
  args.y = call.y.as();
  args.workspace = call.workspace.as();
  const Status status = ffn_forward(call.plan, args);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("x is at an address of remainder 2 modulo 16"), std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace twell
