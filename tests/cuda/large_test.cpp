// The CUDA forward and backward at shapes too large to be simulated.

#include <gtest/gtest.h>

#include "backward_call.h"

namespace twell {
namespace {

class CudaForwardLarge : public CudaForward {};

TEST_F(CudaForwardLarge, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
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

class CudaBackwardLarge : public CudaBackward {};

TEST_F(CudaBackwardLarge, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const Size size : {Size{4, 1032, 264}, {129, 200, 1000}, {1000, 520, 2184}}) {
      for (const double density : {0.0, 0.005, 0.5, 1.0}) {
        const TrainingBlock block(kind, size.tokens, size.hidden, size.neurons, density);
        check(block, name_of(block.problem, density));
      }
    }
  }
}

TEST_F(CudaBackwardLarge, IsExactForMoreTokensThan16BitsCount) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    check_exact({kind, DType::kBf16, 65600, 8, 72});
  }
}

}  // namespace
}  // namespace twell
