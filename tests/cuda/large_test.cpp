// The CUDA forward and backward at shapes too large to be simulated.

#include <gtest/gtest.h>

#include "backward_call.h"

namespace twell {
namespace {

constexpr FfnKind kKinds[] = {FfnKind::kGated, FfnKind::kPlain};
constexpr std::int64_t kManyTokens[] = {65535, 65536, 65537, 131072};  // 16 bits count fewer

class CudaForwardLarge : public CudaForward {};

TEST_F(CudaForwardLarge, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : kKinds) {
    for (const Size size :
         {Size{4, 2056, 264}, {16, 264, 4104}, {129, 200, 1000}, {300, 520, 1032}}) {
      for (const double density : {0.0, 0.005, 0.5, 1.0}) {
        const Block block(kind, size.tokens, size.hidden, size.neurons, density);
        check(block, name_of(block.problem, density));
      }
    }
  }
}

TEST_F(CudaForwardLarge, MatchesFloat64InChunks) {
  check(Block(FfnKind::kGated, 1000, 136, 776, 0.02), "chunks of 128", 128);
  check(Block(FfnKind::kPlain, 1000, 136, 776, 0.02), "chunks of 384", 384);
}

TEST_F(CudaForwardLarge, MatchesFloat64AtAModelsWidth) {
  for (const FfnKind kind : kKinds) check(Block(kind, 200, 2048, 5632, 0.01), name_of(kind));
}

TEST_F(CudaForwardLarge, TakesMoreTokensThan16BitsCount) {
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t tokens : kManyTokens) {
      Block block(kind, tokens, 40, 264, 0.02);
      block.make_sums_exact();
      check(block, name_of(block.problem, 0.02));
      for (const Device& device : devices) {
        EXPECT_LT(sparse_plan(block.problem, device).chunk_tokens, tokens);
      }
    }
  }
}

class CudaBackwardLarge : public CudaBackward {};

TEST_F(CudaBackwardLarge, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : kKinds) {
    for (const Size size : {Size{4, 1032, 264}, {129, 200, 1000}, {1000, 520, 2184}}) {
      for (const double density : {0.0, 0.005, 0.5, 1.0}) {
        const TrainingBlock block(kind, size.tokens, size.hidden, size.neurons, density);
        check(block, name_of(block.problem, density));
      }
    }
  }
}

TEST_F(CudaBackwardLarge, MatchesFloat64AtAModelsWidth) {
  for (const FfnKind kind : kKinds)
    check(TrainingBlock(kind, 200, 2048, 5632, 0.01), name_of(kind));
}

// Few active neurons: lists of many tokens, from several chunks and rounds.
TEST_F(CudaBackwardLarge, ListsMoreTokensThan16BitsCount) {
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t tokens : kManyTokens) {
      const TrainingBlock block(kind, tokens, 24, 264, 0.005);
      check(block, name_of(block.problem, 0.005));
      const std::int64_t active = block.active_pairs();
      for (const Device& device : devices) {
        const FfnPlan plan = training_plan(block.problem, device);
        EXPECT_EQ(has_lists(plan, active), cuda::is_hopper(device));
        EXPECT_GT(cuda::BackwardLayout(plan).chunks, 1);
      }
    }
  }
}

TEST_F(CudaBackwardLarge, IsExactForMoreTokensThan16BitsCount) {
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t tokens : kManyTokens) check_exact({kind, DType::kBf16, tokens, 8, 72});
  }
}

}  // namespace
}  // namespace twell
