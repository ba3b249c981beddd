#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "twell/ffn.h"

namespace twell {
namespace {

Device amx(int threads) {
  Device device;
  device.isa = CpuIsa::kAmxBf16;
  device.threads = threads;
  return device;
}

FfnProblem problem(std::int64_t tokens, std::int64_t hidden = 2048, std::int64_t neurons = 5632) {
  return {FfnKind::kGated, DType::kBf16, tokens, hidden, neurons};
}

void expect_refused(const FfnProblem& p, const Device& device, const char* part) {
  const auto plan = plan_ffn(p, device);
  ASSERT_FALSE(plan.ok()) << part;
  EXPECT_NE(plan.status().message().find(part), std::string::npos) << plan.status().message();
  EXPECT_NE(plan.status().message().find("permitted"), std::string::npos);
}

TEST(PlanFfn, RefusesByName) {
  expect_refused(problem(-1), amx(1), "tokens is -1");
  expect_refused(problem(1, 0), amx(1), "hidden is 0");
  expect_refused(problem(1, 12), amx(1), "hidden is 12");
  expect_refused(problem(1, -8), amx(1), "hidden is -8");
  expect_refused(problem(1, 8, 0), amx(1), "neurons is 0");
  expect_refused(problem(1, 8, 65544), amx(1), "neurons is 65544");
  expect_refused(problem(1, 8, 20), amx(1), "neurons is 20");
  expect_refused(problem(1), amx(0), "device.threads is 0");
}

TEST(PlanFfn, AcceptsTheExtremes) {
  EXPECT_TRUE(plan_ffn(problem(0), amx(1)).ok());
  EXPECT_TRUE(plan_ffn(problem(1, 8, 8), amx(1)).ok());
  EXPECT_TRUE(plan_ffn(problem(1 << 20, 8192, 65536), amx(64)).ok());
}

TEST(PlanFfn, AutoIsSparseUntilDenseIsKnownToBeFaster) {
  PlanOptions options;
  EXPECT_EQ(plan_ffn(problem(512), amx(2), options)->path, FfnPath::kSparse);
  options.expected_active = 40;
  EXPECT_EQ(plan_ffn(problem(512), amx(2), options)->path, FfnPath::kSparse);
  options.expected_active = 5632;
  const auto dense = plan_ffn(problem(512), amx(2), options);
  EXPECT_EQ(dense->path, FfnPath::kDense);
  EXPECT_LT(dense->predicted_dense_ms, dense->predicted_sparse_ms);
  EXPECT_EQ(dense->workspace_bytes, 0u);
  options.path = FfnPath::kSparse;
  EXPECT_EQ(plan_ffn(problem(512), amx(2), options)->path, FfnPath::kSparse);
}

FfnPath chosen(CpuIsa isa, const FfnProblem& p, bool training, double active, double in_union) {
  Device device = amx(2);
  device.isa = isa;
  return plan_ffn(p, device, {FfnPath::kAuto, training, active, in_union})->path;
}

TEST(PlanFfn, AutoIsDenseWhereDenseIsFaster) {
  for (const CpuIsa isa : {CpuIsa::kAvx512Bf16, CpuIsa::kAmxBf16}) {
    for (const bool training : {false, true}) {
      SCOPED_TRACE(std::string(name_of(isa)) + (training ? ", training" : ""));
      EXPECT_EQ(chosen(isa, problem(512), training, 0.5 * 5632, -1), FfnPath::kDense);
      EXPECT_EQ(chosen(isa, problem(512), training, 0.01 * 5632, -1), FfnPath::kSparse);
      // Layers 1, 2, 4, 5 and 7 of the traces: active neurons and union of 128 tokens.
      for (const auto& [active, in_union] :
           {std::pair{8., 221.}, {10., 307.}, {24., 739.}, {42., 1106.}, {112., 2565.}}) {
        EXPECT_EQ(chosen(isa, problem(512), training, active, in_union), FfnPath::kSparse);
      }
    }
  }
  // The demo's block, early and late in training.
  const FfnProblem demo = problem(2048, 256, 1024);
  EXPECT_EQ(chosen(CpuIsa::kAvx512Bf16, demo, true, 0.5 * 1024, -1), FfnPath::kDense);
  EXPECT_EQ(chosen(CpuIsa::kAvx512Bf16, demo, true, 0.04 * 1024, -1), FfnPath::kSparse);
}

TEST(PlanFfn, TrainingPredictsTheBackwardToo) {
  for (const std::int64_t tokens : {0, 64, 2048}) {
    PlanOptions options;
    options.expected_active = 40;
    const auto forward = plan_ffn(problem(tokens), amx(2), options);
    options.training = true;
    const auto both = plan_ffn(problem(tokens), amx(2), options);
    EXPECT_GE(both->predicted_dense_ms, 3 * forward->predicted_dense_ms);
    EXPECT_GE(both->predicted_sparse_ms, forward->predicted_sparse_ms);
    if (tokens > 0) {  // the backward multiplies at the active places only
      EXPECT_LT(both->predicted_sparse_ms - forward->predicted_sparse_ms,
                both->predicted_dense_ms - forward->predicted_dense_ms);
    }
  }
}

TEST(PlanFfn, PredictionsGrowWithDensityAndTokens) {
  double last = 0;
  for (const double active : {0.0, 40.0, 400.0, 2816.0}) {
    PlanOptions options;
    options.expected_active = active;
    const double ms = plan_ffn(problem(512), amx(2), options)->predicted_sparse_ms;
    EXPECT_GE(ms, last);
    last = ms;
  }
  EXPECT_LT(plan_ffn(problem(1), amx(2))->predicted_sparse_ms,
            plan_ffn(problem(512), amx(2))->predicted_sparse_ms);
  EXPECT_EQ(plan_ffn(problem(0), amx(2))->predicted_sparse_ms, 0);
}

// What decides the order of sums must not depend on the number of threads.
TEST(PlanFfn, ThreadsChangeOnlyTheWorkspace) {
  for (const std::int64_t tokens : {1, 8, 9, 100, 512, 513, 5000}) {
    const auto one = plan_ffn(problem(tokens), amx(1)), many = plan_ffn(problem(tokens), amx(7));
    EXPECT_EQ(one->tile_tokens, many->tile_tokens);
    EXPECT_EQ(one->chunk_tokens, many->chunk_tokens);
    EXPECT_EQ(one->block_neurons, many->block_neurons);
    EXPECT_EQ(one->heavy_tokens, many->heavy_tokens);
    EXPECT_LT(one->workspace_bytes, many->workspace_bytes);
    EXPECT_EQ(one->chunk_tokens % one->tile_tokens, 0);
  }
}

TEST(PlanFfn, SavesOnlyWhenTraining) {
  PlanOptions options;
  EXPECT_EQ(plan_ffn(problem(64), amx(2), options)->saved_bytes, 0u);
  options.training = true;
  EXPECT_GT(plan_ffn(problem(64), amx(2), options)->saved_bytes, 0u);
  EXPECT_GT(plan_ffn(problem(64), amx(2), options)->backward_workspace_bytes, 0u);
}

TEST(PlanFfn, PrintsWhatWillRun) {
  const std::string text = plan_ffn(problem(512), amx(2))->to_string();
  for (const char* part : {"gated", "bfloat16", "tokens 512", "hidden 2048", "neurons 5632",
                           "amx_bf16, 2 threads", "path: sparse", "predicted", "workspace"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in:\n" << text;
  }
}

TEST(CpuDevice, IsDescribed) {
  EXPECT_EQ(cpu_device(3).to_string(),
            "cpu, " + std::string(name_of(detect_cpu_isa())) + ", 3 threads");
}

}  // namespace
}  // namespace twell
