// The planner for CUDA devices, on a machine that need not have one.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "twell/ffn.h"

namespace twell {
namespace {

Device hopper() {
  Device device;
  device.type = DeviceType::kCuda;
  device.compute_capability = 90;
  device.multiprocessors = 132;
  device.shared_memory_bytes = 232448;
  device.l2_bytes = 60u << 20;
  return device;
}

Device with_capability(int capability) {
  Device device = hopper();
  device.compute_capability = capability;
  return device;
}

FfnProblem problem(std::int64_t tokens) {
  return {FfnKind::kGated, DType::kBf16, tokens, 2048, 5632};
}

TEST(PlanCuda, PicksDenseOnlyWhereDenseIsPredictedFaster) {
  PlanOptions options;
  options.expected_active = 29;
  options.expected_union = 1100;
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->path, FfnPath::kSparse);
  options.expected_active = 2816;
  options.expected_union = 5632;
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->path, FfnPath::kDense);
  options.path = FfnPath::kSparse;
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->path, FfnPath::kSparse);
}

TEST(PlanCuda, PicksDenseForTheSizesWhereLaunchesDominate) {
  EXPECT_EQ(plan_ffn(problem(1), hopper())->path, FfnPath::kSparse);
  EXPECT_EQ(plan_ffn(problem(32), hopper())->path, FfnPath::kSparse);  // the last in one group
  EXPECT_EQ(plan_ffn(problem(65), hopper())->path, FfnPath::kDense);
  EXPECT_EQ(plan_ffn(problem(128), hopper())->path, FfnPath::kDense);
  EXPECT_EQ(plan_ffn(problem(4096), hopper())->path, FfnPath::kSparse);
}

// With every neuron equally active; by the H200's times (ms, dense and sparse) in CUDA graphs.
TEST(PlanCuda, WeighsTheRowsThatFewTokensUse) {
  const struct {
    double share;
    std::int64_t tokens;
    double dense_ms, sparse_ms;
  } measured[] = {
      {0.5, 1, 0.0325, 0.0311},   {0.5, 4, 0.0324, 0.0469},   {0.5, 16, 0.0331, 0.0525},
      {0.5, 32, 0.0338, 0.0635},  {0.5, 64, 0.0360, 0.1012},  {0.2, 1, 0.0326, 0.0189},
      {0.2, 4, 0.0324, 0.0334},   {0.2, 16, 0.0329, 0.0510},  {0.2, 64, 0.0360, 0.0971},
      {0.05, 1, 0.0303, 0.0144},  {0.05, 4, 0.0323, 0.0184},  {0.05, 16, 0.0329, 0.0353},
      {0.05, 32, 0.0337, 0.0499}, {0.05, 64, 0.0361, 0.0778},
  };
  for (const auto& m : measured) {
    PlanOptions options;
    options.expected_active = m.share * 5632;
    const FfnPlan plan = plan_ffn(problem(m.tokens), hopper(), options).value();
    SCOPED_TRACE(std::to_string(m.tokens) + " tokens, active " + std::to_string(m.share));
    EXPECT_EQ(plan.path, m.dense_ms > m.sparse_ms ? FfnPath::kSparse : FfnPath::kDense);
    EXPECT_NEAR(plan.predicted_dense_ms, m.dense_ms, 0.1 * m.dense_ms);
    EXPECT_NEAR(plan.predicted_sparse_ms, m.sparse_ms, 0.1 * m.sparse_ms);
    // A union that is known to be small is believed.
    options.expected_union = 56;
    EXPECT_LT(plan_ffn(problem(m.tokens), hopper(), options)->predicted_sparse_ms,
              plan.predicted_sparse_ms);
  }
}

TEST(PlanCuda, BoundsTheWorkspaceForAnyNumberOfTokens) {
  const std::size_t large = plan_ffn(problem(131072), hopper())->workspace_bytes;
  EXPECT_GT(large, 0u);
  EXPECT_LT(large, std::size_t{1} << 30);
  EXPECT_LT(plan_ffn(problem(2000000000), hopper())->workspace_bytes, large + (256u << 20));
  EXPECT_GT(plan_ffn(problem(1), hopper())->workspace_bytes, 0u);
}

TEST(PlanCuda, TrainsWithABoundedWorkspaceAndLittleSaved) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->saved_bytes, 0u);
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->backward_workspace_bytes, 0u);
  options.training = true;
  const FfnPlan plan = plan_ffn(problem(16384), hopper(), options).value();
  EXPECT_TRUE(plan.training);
  // A bit for each neuron and 64 tokens; g and u of 14% of all neurons; a few counts.
  const std::size_t masks = 16384u * 5632 / 8 / 64;
  const std::size_t columns = std::size_t{2 * 2 * 2 * 64 * 64} * (128 * 5632 * 14 / 100 / 64);
  EXPECT_GE(plan.saved_bytes, masks + columns);
  EXPECT_LE(plan.saved_bytes, masks + columns + 1024);
  EXPECT_EQ(plan_ffn(problem(16384), with_capability(80), options)->saved_bytes, plan.saved_bytes);
  // Three tenths of the dense block's 809.5 MB, as measured (bench/results/h200/ffn_backward.json).
  EXPECT_LE(plan.saved_bytes + plan.workspace_bytes, 242'850'000u);
  EXPECT_LE(plan.saved_bytes + plan.backward_workspace_bytes, 242'850'000u);
  // Beyond a chunk only a list's row of 8 bytes for each token and block of 64 neurons.
  EXPECT_LT(plan_ffn(problem(2000000000), hopper(), options)->backward_workspace_bytes,
            (std::size_t{1} << 30) + 2000000128u * std::size_t{88 * 8});
  EXPECT_LT(plan_ffn(problem(2000000000), with_capability(80), options)->backward_workspace_bytes,
            std::size_t{600} << 20);
  // The kernels for few tokens save nothing.
  EXPECT_EQ(plan_ffn(problem(1), hopper(), options)->tile_tokens,
            plan_ffn(problem(16384), hopper(), options)->tile_tokens);
  FfnProblem plain = problem(16384);
  plain.kind = FfnKind::kPlain;
  EXPECT_LT(plan_ffn(plain, hopper(), options)->backward_workspace_bytes,
            plan.backward_workspace_bytes);
}

TEST(PlanCuda, CutsLongInputsSoThatTheirWavesAreFull) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  // 132 pairs of tiles by 22 blocks of neurons are 44 waves of 66 pairs of multiprocessors, and 264
  // tiles by 8 strips of outputs 16 waves of 132. 270 tiles would be as good for the gate, but not
  // for down; 256 for neither.
  EXPECT_EQ(plan_ffn(problem(131072), hopper(), options)->chunk_tokens, 264 * 128);
  EXPECT_EQ(plan_ffn(problem(272 * 128), hopper(), options)->chunk_tokens, 272 * 128);
  EXPECT_EQ(plan_ffn(problem(300), hopper(), options)->chunk_tokens, 3 * 128);
}

TEST(PlanCuda, TrainsInSmallChunksThatFillTheMultiprocessors) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  options.training = true;
  // On 66 pairs of multiprocessors, 32 pairs of tiles by 22 blocks of neurons are 11 waves, twice:
  // as many as all 128 tiles at once. With 63 tiles there would be a third chunk.
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->chunk_tokens, 64 * 128);
  // 64 pairs of tiles by 12 blocks of neurons are 11.6 waves, and 60 are 10.9: 5 chunks of 120
  // tiles need 55, 4 of 128 and the rest 56.
  FfnProblem narrow = problem(120 * 128 * 5);
  narrow.neurons = 12 * 256;
  EXPECT_EQ(plan_ffn(narrow, hopper(), options)->chunk_tokens, 120 * 128);
  for (const std::int64_t tokens : {0, 1, 129, 16384, 16385, 2000000000}) {
    const FfnPlan plan = plan_ffn(problem(tokens), hopper(), options).value();
    EXPECT_LE(plan.chunk_tokens, 128 * 128);
    EXPECT_GE(plan.chunk_tokens,
              std::min<std::int64_t>(std::max<std::int64_t>(tokens, 1), 24 * 128));
    EXPECT_EQ(plan.chunk_tokens % 128, 0);
    EXPECT_LE(plan.workspace_bytes, plan.backward_workspace_bytes);
  }
}

TEST(PlanCuda, KnowsThatListsOverflow) {
  PlanOptions options;
  options.training = true;
  options.expected_active = 40;  // of 2^25 - 1 pairs in all
  options.expected_union = 1100;
  const double listed = plan_ffn(problem(838'000), hopper(), options)->predicted_sparse_ms;
  const double dense = plan_ffn(problem(839'000), hopper(), options)->predicted_sparse_ms;
  EXPECT_GT(dense, 1.1 * listed);
}

TEST(PlanCuda, PredictsForwardAndBackwardWhenTraining) {
  PlanOptions options;
  options.expected_active = 29;
  options.expected_union = 500;
  const FfnPlan forward = plan_ffn(problem(16384), hopper(), options).value();
  options.training = true;
  const FfnPlan both = plan_ffn(problem(16384), hopper(), options).value();
  EXPECT_EQ(both.path, FfnPath::kSparse);
  EXPECT_GT(both.predicted_sparse_ms, forward.predicted_sparse_ms);
  EXPECT_DOUBLE_EQ(both.predicted_dense_ms, 3 * forward.predicted_dense_ms);
  options.expected_active = 2816;
  options.expected_union = 5632;
  EXPECT_EQ(plan_ffn(problem(16384), hopper(), options)->path, FfnPath::kDense);
  EXPECT_EQ(plan_ffn(problem(1), hopper(), options)->path, FfnPath::kDense);
}

TEST(PlanCuda, RefusesByName) {
  PlanOptions options;
  const auto message = [&](const FfnProblem& p, const Device& device) {
    const Result<FfnPlan> plan = plan_ffn(p, device, options);
    EXPECT_FALSE(plan.ok());
    return plan.status().message();
  };
  options.path = FfnPath::kSparse;
  FfnProblem wide = problem(1);
  wide.dtype = DType::kFloat32;
  EXPECT_NE(message(wide, hopper()).find("dtype is float32"), std::string::npos);
  EXPECT_NE(message(problem(65), with_capability(75)).find("compute_capability is 75"),
            std::string::npos);
}

// PyTorch's products run where twell's kernels do not.
TEST(PlanCuda, LeavesToDenseWhatItDoesNotOffer) {
  FfnProblem wide = problem(4096);
  wide.dtype = DType::kFloat32;
  PlanOptions options;
  options.expected_active = 0;
  for (const bool training : {false, true}) {
    options.training = training;
    EXPECT_EQ(plan_ffn(wide, hopper(), options)->path, FfnPath::kDense);
    for (const int capability : {61, 70, 75}) {
      for (const std::int64_t tokens : {1, 64, 4096}) {
        EXPECT_EQ(plan_ffn(problem(tokens), with_capability(capability), options)->path,
                  FfnPath::kDense)
            << capability << ", " << tokens << " tokens";
      }
    }
  }
}

TEST(PlanCuda, OffersEveryGpuSinceAmpere) {
  PlanOptions options;
  options.path = FfnPath::kSparse;
  for (const int capability : {80, 86, 89, 90, 100, 120}) {
    for (const std::int64_t tokens : {0, 1, 64, 65, 4096}) {
      EXPECT_EQ(plan_ffn(problem(tokens), with_capability(capability), options)->path,
                FfnPath::kSparse)
          << capability << ", " << tokens << " tokens";
    }
  }
}

TEST(PlanCuda, PredictsByGeneration) {
  PlanOptions options;
  options.expected_union = 1100;
  EXPECT_EQ(plan_ffn(problem(16384), with_capability(80), options)->path, FfnPath::kSparse);
  EXPECT_EQ(plan_ffn(problem(16384), with_capability(89), options)->path, FfnPath::kSparse);
  // Where PyTorch's products have instructions that ours do not use.
  EXPECT_EQ(plan_ffn(problem(16384), with_capability(100), options)->path, FfnPath::kDense);
}

}  // namespace
}  // namespace twell
