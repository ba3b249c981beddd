// The CUDA forward against a float64 oracle.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "forward_call.h"

namespace twell {
namespace {

constexpr FfnKind kKinds[] = {FfnKind::kGated, FfnKind::kPlain};

TEST_F(CudaForward, MatchesFloat64AtEveryShapeAndDensity) {
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : kKinds) {
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
  for (const FfnKind kind : kKinds) {
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

// As the gate, up and down take them, for 3 tiles.
struct Pieces {
  int multiprocessors, region, item, outputs;
};

class CudaForwardPieces : public CudaForward, public ::testing::WithParamInterface<Pieces> {};

INSTANTIATE_TEST_SUITE_P(OfEverySize, CudaForwardPieces,
                         ::testing::Values(Pieces{64, 128, 128, 64}, Pieces{12, 128, 256, 128},
                                           Pieces{2, 256, 256, 256}),
                         [](const auto& info) {
                           return "of_" + std::to_string(info.param.multiprocessors);
                         });

TEST_P(CudaForwardPieces, MatchFloat64) {
  const Pieces want = GetParam();
  ASSERT_NO_FATAL_FAILURE(make_hopper_with(want.multiprocessors));
  if (IsSkipped()) return;
  const int multiprocessors = devices[0].multiprocessors;
  EXPECT_EQ(cuda::gate_region(3, 776, multiprocessors), want.region);
  EXPECT_EQ(cuda::up_item(3, multiprocessors), want.item);
  EXPECT_EQ(cuda::down_outputs(3, 264, multiprocessors), want.outputs);
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.005, 0.5, 1.0}) {
      const Block block(kind, 300, 264, 776, density);
      check(block, name_of(block.problem, density));
    }
  }
}

TEST_F(CudaForward, TakesNoTokens) {
  for (const FfnKind kind : kKinds) check(Block(kind, 0, 64, 256, 0.5), "none");
}

TEST_F(CudaForward, MatchesFloat64AtRandomShapes) {
  std::mt19937_64 random(13);
  const auto up_to = [&](std::int64_t most) {
    return static_cast<std::int64_t>(random() % most) + 1;
  };
  constexpr double kDensities[] = {0.003, 0.03, 0.3, 1.0};
  for (int i = 0; i < 20; ++i) {
    const FfnKind kind = random() % 2 == 0 ? FfnKind::kGated : FfnKind::kPlain;
    const std::int64_t tokens = up_to(401) - 1, hidden = 8 * up_to(40), neurons = 8 * up_to(60);
    const double density = kDensities[random() % 4];
    const Block block(kind, tokens, hidden, neurons, density);
    check(block, name_of(block.problem, density));
  }
}

// Blocks in which few neurons or tokens are active, of either kind, for the kernels for few tokens,
// with one group of them and with two, and for those for many.
class CudaForwardUneven : public CudaForward {
 protected:
  // check(block, name) after change(block), of a block in which no neuron is active.
  template <class Change>
  void check_all(std::int64_t hidden, std::int64_t neurons, Change&& change) {
    for (const FfnKind kind : kKinds) {
      for (const std::int64_t tokens : {16, 64, 200}) {
        Block block(kind, tokens, hidden, neurons, 0);
        change(block);
        check(block, name_of(block.problem, 0));
      }
    }
  }
};

TEST_F(CudaForwardUneven, TakesOneHeavyTokenAmongEmptyOnes) {
  check_all(64, 1024, [](Block& block) {
    block.x[block.problem.tokens / 3 * 64] = to_bf16(-8.0f);  // the bias, the other way round
  });
}

TEST_F(CudaForwardUneven, TakesActiveNeuronsInOneBlockOnly) {
  check_all(64, 1024, [](Block& block) {
    for (std::int64_t n = 512; n < 768; ++n) block.set_bias(n, 4.0f);
  });
}

TEST_F(CudaForwardUneven, TakesOneActiveNeuron) {
  check_all(72, 136, [](Block& block) { block.set_bias(133, 4.0f); });
}

TEST_F(CudaForward, TakesActiveTokensInOneTileOnly) {
  for (const FfnKind kind : kKinds) {
    Block block(kind, 300, 64, 264, 1.0);
    for (std::int64_t t = 0; t < 300; ++t) {
      if (t / 128 != 1) block.x[t * 64] = to_bf16(-8.0f);  // the bias, the other way round
    }
    check(block, "one tile");
  }
}

// All 64 neurons of the first step lie side by side, and so do its first and last: but in between
// neuron 10, which the second half does not use either, comes second.
TEST_F(CudaForward, GathersAStepThatIsAdjacentAtItsEndsOnly) {
  for (const FfnKind kind : kKinds) {
    Block block(kind, 128, 72, 136, 1);
    for (std::int64_t t = 0; t < 128; ++t) block.x[t * 72 + 1] = to_bf16(t < 64 ? 0.0f : -8.0f);
    for (std::int64_t n = 0; n < 136; ++n) {
      block.deciding()[n * 72 + 1] = to_bf16(n == 0 || n == 10 ? 9.0f : 0.0f);
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
  for (const FfnKind kind : kKinds) {
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
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t tokens : {40, 150}) {
      Block block(kind, tokens, 72, 136, 0.1);
      for (std::vector<bf16>* weights : {&block.gate, &block.up, &block.down}) {
        for (bf16& value : *weights) value.bits &= 0x7fffu;  // positive
      }
      block.x[(tokens - 1) * 72 + 6] = to_bf16(infinity_);
      check_kinds(block, "infinity in y");
      // A neuron that is silent for all tokens: 0 · inf.
      block.set_bias(131, -100.0f);
      block.deciding()[131 * 72 + 6].bits |= 0x8000u;
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
