#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "app/bench/ffn_bench.h"
#include "app/bench/machine.h"
#include "app/bench/patterned_ffn.h"
#include "app/error.h"

namespace twell::app {
namespace {

using torch::Tensor;

// The pattern of the deciding projection in float64, by PyTorch.
Tensor pattern_of(const PatternedFfn& ffn) {
  return torch::matmul(ffn.x.to(torch::kFloat64), ffn.gate().to(torch::kFloat64).t()).gt(0);
}

TEST(PatternedFfn, FollowsThePatternExactly) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const double density : {0.0, 0.01, 0.5, 1.0}) {
      const std::int64_t distinct = 100, tokens = 250, hidden = 256, neurons = 520;
      const Trace pattern = random_pattern(distinct, neurons, density, 7);
      const PatternedFfn ffn(random_ffn(kind, hidden, neurons, 1), kind, pattern, tokens, 2);
      const Tensor active = pattern_of(ffn);
      for (std::int64_t token = 0; token < tokens; ++token) {
        const Tensor expected = torch::zeros(neurons, torch::kBool);
        for (const auto neuron : pattern.row(token % distinct)) expected[neuron] = true;
        ASSERT_TRUE(active[token].equal(expected)) << density << " " << token;
      }
      EXPECT_TRUE(ffn.pattern_matches());
    }
  }
}

TEST(PatternedFfn, NoticesAForeignPattern) {
  const Trace pattern = random_pattern(16, 64, 0.1, 7);
  const FfnTensors base = random_ffn(FfnKind::kGated, 64, 64, 1);
  PatternedFfn ffn(base, FfnKind::kGated, pattern, 16, 2);
  ASSERT_TRUE(ffn.pattern_matches());
  ffn.pattern = random_pattern(16, 64, 0.1, 8);
  EXPECT_FALSE(ffn.pattern_matches());
}

TEST(PatternedFfn, OwnsItsLayouts) {
  const FfnTensors base = random_ffn(FfnKind::kGated, 64, 40, 1);
  const PatternedFfn ffn(base, FfnKind::kGated, random_pattern(8, 40, 0.1, 7), 8, 2);
  EXPECT_TRUE(ffn.up().equal(base.gate_up.narrow(0, 40, 40)));
  EXPECT_TRUE(ffn.down.equal(base.down));
  EXPECT_TRUE(ffn.down_transposed.equal(base.down.t()));
  EXPECT_TRUE(ffn.down_transposed.is_contiguous());
  EXPECT_NE(ffn.down.data_ptr(), base.down.data_ptr());  // memory of its own
}

TEST(PatternedFfn, RefusesWhatDoesNotFit) {
  const FfnTensors base = random_ffn(FfnKind::kGated, 64, 40, 1);
  EXPECT_THROW(PatternedFfn(base, FfnKind::kGated, random_pattern(33, 40, 0.1, 7), 33, 2), Error);
  EXPECT_THROW(PatternedFfn(base, FfnKind::kGated, random_pattern(8, 41, 0.1, 7), 8, 2), Error);
}

TEST(Window, WrapsAround) {
  const Trace trace = random_pattern(5, 30, 0.3, 7);
  const Trace rows = window(trace, 3, 4);
  ASSERT_EQ(rows.tokens(), 4);
  for (const int i : {0, 1, 2, 3}) {
    const auto expected = trace.row((3 + i) % 5);
    EXPECT_TRUE(
        std::equal(expected.begin(), expected.end(), rows.row(i).begin(), rows.row(i).end()));
  }
}

TEST(BenchFfn, ReportsWhatItRan) {
  FfnBenchOptions options;
  options.hidden = 128;
  options.neurons = 264;
  options.seconds = 0;
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const std::int64_t tokens : {1, 3, 128, 200}) {
      options.kind = kind;
      options.tokens = tokens;
      const Trace pattern = random_pattern(640, options.neurons, 0.05, 3);
      const auto result = bench_ffn("small", pattern, options);
      EXPECT_EQ(result["case"], "small");
      EXPECT_EQ(result["tokens"], tokens);
      EXPECT_EQ(result["path"], "twell");
      EXPECT_EQ(result["pattern_verified"], true);
      EXPECT_GT(double{result["twell_ms"]}, 0);
      EXPECT_DOUBLE_EQ(double{result["ratio"]},
                       double{result["dense_ms"]} / double{result["twell_ms"]});
      EXPECT_NEAR(double{result["active_mean"]}, 0.05 * 264, 1);
      if (tokens == 1) {
        EXPECT_DOUBLE_EQ(double{result["union_mean"]}, double{result["active_mean"]});
      } else {
        EXPECT_GT(double{result["union_mean"]}, double{result["active_mean"]});
      }
      EXPECT_LE(double{result["twell_error"]}, 1.1 * double{result["dense_error"]});
      EXPECT_EQ(result["spread_ms"].size(), kind == FfnKind::kGated ? 3u : 2u);
    }
  }
}

TEST(BenchFfn, AutoAsksThePlanner) {
  FfnBenchOptions options;
  options.hidden = 128;
  options.neurons = 264;
  options.seconds = 0;
  options.path = FfnPath::kAuto;
  options.tokens = 256;
  for (const double density : {0.0, 1.0}) {
    const auto result = bench_ffn("x", random_pattern(128, 264, density, 3), options);
    const FfnProblem problem{FfnKind::kGated, DType::kBf16, 256, 128, 264};
    const auto plan = plan_ffn(problem, cpu_device(at::get_num_threads()),
                               {FfnPath::kAuto, false, 264 * density, 264 * density});
    ASSERT_TRUE(plan.ok());
    EXPECT_EQ(result["path"], plan->path == FfnPath::kDense ? "dense" : "twell") << density;
  }
}

TEST(Machine, IsDescribed) {
  const auto machine = describe_machine(torch::kCPU);
  for (const char* key : {"cpu", "isa", "threads", "twell", "torch", "compiler", "date"}) {
    EXPECT_TRUE(machine.contains(key)) << key;
  }
  EXPECT_GT(int{machine["threads"]}, 0);
}

}  // namespace
}  // namespace twell::app
