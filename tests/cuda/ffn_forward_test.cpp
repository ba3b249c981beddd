// The CUDA forward against a float64 oracle.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "forward_call.h"

namespace twell {
namespace {

TEST_F(CudaForward, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const Size size : {Size{1, 64, 256},
                            {3, 8, 8},
                            {50, 136, 520},
                            {64, 64, 256},
                            {65, 64, 256},
                            {127, 72, 264},
                            {128, 8, 8},
                            {129, 72, 392},
                            {200, 200, 264}}) {
      for (const double density : {0.0, 0.005, 0.5, 1.0}) {
        const Block block(kind, size.tokens, size.hidden, size.neurons, density);
        check(block, name_of(block.problem, density));
      }
    }
  }
}

// Groups of 8, 16 and 32 tokens, full or not; more than 2048 summed elements, which take several
// rounds; more neurons than one pass over the lists takes.
TEST_F(CudaForward, MatchesFloat64WithFewTokens) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const Size size : {Size{8, 2048, 152},
                            {7, 2056, 104},
                            {16, 4104, 56},
                            {12, 72, 520},
                            {17, 2200, 152},
                            {33, 136, 520},
                            {64, 1160, 152},
                            {2, 8, 13000}}) {
      for (const double density : {0.1, 1.0}) {
        const Block block(kind, size.tokens, size.hidden, size.neurons, density);
        check(block, name_of(block.problem, density));
      }
    }
  }
}

TEST_F(CudaForward, MatchesFloat64InChunks) {
  check(Block(FfnKind::kGated, 300, 40, 776, 0.02), "chunks of 128", 128);
  check(Block(FfnKind::kPlain, 600, 40, 776, 0.02), "chunks of 384", 384);
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

TEST_F(CudaForward, TakesOneActiveNeuron) {
  Block block(FfnKind::kGated, 150, 72, 136, 0.0);
  block.gate[133 * 72] = to_bf16(4.0f);
  check(block, "one neuron");
}

TEST_F(CudaForward, TakesActiveTokensInOneTileOnly) {
  Block block(FfnKind::kGated, 300, 64, 264, 1.0);
  for (std::int64_t t = 0; t < 300; ++t) {
    if (t / 128 != 1) block.x[t * 64] = to_bf16(-8.0f);  // the bias, the other way round
  }
  check(block, "one tile");
}

// All 64 neurons of the first step lie side by side, and so do its first and last: but in between
// neuron 10, which the second half does not use either, comes second.
TEST_F(CudaForward, GathersAStepThatIsAdjacentAtItsEndsOnly) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    Block block(kind, 128, 72, 136, 1);
    for (std::int64_t t = 0; t < 128; ++t) block.x[t * 72 + 1] = to_bf16(t < 64 ? 0.0f : -8.0f);
    std::vector<bf16>& deciding = kind == FfnKind::kGated ? block.gate : block.up;
    for (std::int64_t n = 0; n < 136; ++n) {
      deciding[n * 72 + 1] = to_bf16(n == 0 || n == 10 ? 9.0f : 0.0f);
    }
    check(block, "neurons 0 and 10 of the first half alone");
  }
}

class CudaForwardNotFinite : public CudaForward {
 protected:
  // y is NaN, infinite (of the same sign) or finite where the dense block's is.
  void check_kinds(const Block& block, const std::string& name) {
    const std::vector<double> want = block.output();
    for (const Device& device : devices) {
      SCOPED_TRACE(name + ", " + std::string(name_of(block.problem.kind)) + ", tokens " +
                   std::to_string(block.problem.tokens) + " as sm_" +
                   std::to_string(device.compute_capability));
      Call call(sparse_plan(block.problem, device), block);
      ASSERT_TRUE(call.run().ok());
      const std::vector<bf16> got = call.y.download<bf16>();
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

  const float infinity_ = std::numeric_limits<float>::infinity();
  const float nan_ = std::numeric_limits<float>::quiet_NaN();
};

TEST_F(CudaForwardNotFinite, SpreadsFromATokenAsDense) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const std::int64_t tokens : {40, 300}) {
      Block block(kind, tokens, 72, 520, 0.02);
      block.x[3 * 72 + 5] = to_bf16(nan_);
      block.x[tokens / 2 * 72 + 6] = to_bf16(infinity_);
      block.x[(tokens - 1) * 72 + 7] = to_bf16(-infinity_);
      check_kinds(block, "NaN, inf, -inf");
    }
  }
}

TEST_F(CudaForwardNotFinite, TellsInfinityFromNan) {
  for (const FfnKind kind : {FfnKind::kGated, FfnKind::kPlain}) {
    for (const std::int64_t tokens : {40, 150}) {
      Block block(kind, tokens, 72, 136, 0.1);
      for (std::vector<bf16>* weights : {&block.gate, &block.up, &block.down}) {
        for (bf16& value : *weights) value.bits &= 0x7fffu;  // positive
      }
      block.x[(tokens - 1) * 72 + 6] = to_bf16(infinity_);
      check_kinds(block, "infinity in y");
      // A neuron that is silent for all tokens: 0 · inf.
      std::vector<bf16>& deciding = kind == FfnKind::kGated ? block.gate : block.up;
      deciding[131 * 72] = to_bf16(-100.0f);
      deciding[131 * 72 + 6].bits |= 0x8000u;
      check_kinds(block, "one neuron silent");
    }
  }
}

// As twell/ffn.h says.
TEST_F(CudaForwardNotFinite, TakesWeights) {
  constexpr std::int64_t kSilent = 0, kBusy = 130, kHidden = 72;
  for (const std::int64_t tokens : {40, 150}) {
    Block block(FfnKind::kGated, tokens, kHidden, 264, 0.2);
    block.gate[kSilent * kHidden] = to_bf16(-9.0f);
    block.gate[kBusy * kHidden] = to_bf16(9.0f);
    block.up[kSilent * kHidden + 2] = block.down[kSilent * kHidden + 3] = to_bf16(infinity_);
    block.down[kBusy * kHidden + 4] = to_bf16(nan_);
    for (const Device& device : devices) {
      SCOPED_TRACE(name_of(block.problem, 0.2) + " as sm_" +
                   std::to_string(device.compute_capability));
      Call call(sparse_plan(block.problem, device), block);
      ASSERT_TRUE(call.run().ok());
      const std::vector<bf16> y = call.y.download<bf16>();
      for (std::size_t i = 0; i < y.size(); ++i) {
        EXPECT_EQ(std::isfinite(to_float(y[i])), i % kHidden != 4) << i;
      }
      Block deciding = block;
      deciding.gate[kBusy * kHidden + 1] = to_bf16(nan_);
      Call all(sparse_plan(block.problem, device), deciding);
      ASSERT_TRUE(all.run().ok());
      for (const bf16 value : all.y.download<bf16>()) EXPECT_TRUE(std::isnan(to_float(value)));
      EXPECT_EQ(all.activity.download<std::int32_t>()[kBusy], tokens);
    }
  }
}

TEST_F(CudaForward, RefusesByName) {
  const Block block(FfnKind::kGated, 16, 64, 256, 0.5);
  Call call(sparse_plan(block.problem, devices[0]), block);
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
