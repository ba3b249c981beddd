// The CUDA backward against a float64 oracle.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backward_call.h"

namespace twell {
namespace {

constexpr FfnKind kKinds[] = {FfnKind::kGated, FfnKind::kPlain};

TEST_F(CudaBackward, MatchesFloat64AtEveryShapeAndDensity) {
  constexpr double kShares[] = {kKeepAll, 0.5, 0};
  int cases = 0;
  struct Size {
    std::int64_t tokens, hidden, neurons;
  };
  for (const FfnKind kind : kKinds) {
    for (const Size size : {Size{1, 72, 264},
                            {65, 136, 72},
                            {127, 72, 136},
                            {128, 8, 520},
                            {129, 200, 72},
                            {200, 136, 264},
                            {300, 40, 136}}) {
      for (const double density : {0.0, 0.05, 0.5, 1.0}) {
        const TrainingBlock block(kind, size.tokens, size.hidden, size.neurons, density);
        const double share = kShares[cases++ % 3];
        check(block, name_of(block.problem, density) + " share " + std::to_string(share), 0, share);
      }
    }
  }
}

TEST_F(CudaBackward, IsExactWhereSumsAre) {
  for (const FfnKind kind : kKinds) {
    for (const std::int64_t neurons : {8, 72, 264}) {
      for (const int chunk_tokens : {0, 128, 256}) {
        for (const double share : {0.0, kKeepAll}) {
          check_exact({kind, DType::kBf16, 300, 8, neurons}, chunk_tokens, share);
        }
      }
    }
  }
  check_exact({FfnKind::kGated, DType::kBf16, 33000, 8, 8});  // more than a chunk
}

TEST_F(CudaBackward, MatchesFloat64InChunksAndGroupsOfNeurons) {
  check(TrainingBlock(FfnKind::kGated, 400, 40, 264, 0.05), "chunks of 128", 128, kKeepAll);
  check(TrainingBlock(FfnKind::kPlain, 400, 40, 264, 0.3), "chunks of 256", 256, kKeepAll);
  check(TrainingBlock(FfnKind::kGated, 65, 24, 2120, 0.02), "two groups");
  check(TrainingBlock(FfnKind::kGated, 600, 264, 136, 0.3), "dense chunks of 256, strips", 128);
}

// As many of the gradient of x at a time as all multiprocessors have room for at once.
TEST_F(CudaBackward, MatchesFloat64WithPiecesOfEverySize) {
  for (const auto& [multiprocessors, outputs] : {std::pair{64, 64}, {12, 128}, {2, 256}}) {
    ASSERT_NO_FATAL_FAILURE(make_hopper_with(multiprocessors));
    if (IsSkipped()) return;
    EXPECT_EQ(cuda::down_outputs(3, 264, multiprocessors), outputs);
    for (const FfnKind kind : kKinds) {
      check(TrainingBlock(kind, 300, 264, 392, 0.05), std::to_string(outputs) + " outputs");
    }
  }
}

// With room for the columns of one tile in full: two tiles of few neurons, one of all, three of
// few, of which the last is not whole.
TEST_F(CudaBackward, MatchesFloat64InUnevenRounds) {
  for (const FfnKind kind : kKinds) {
    for (const int heavy_tokens : {3, 128}) {  // the latter are too many for lists
      TrainingBlock block(kind, 700, 40, 264, 0.001);
      for (int t = 256; t < 256 + heavy_tokens; ++t) block.x[t * 40] = to_bf16(-8.0f);
      for (const double share : {0.0, 0.3}) {
        check(block, std::to_string(heavy_tokens) + " heavy tokens, share " + std::to_string(share),
              128, share);
      }
    }
  }
}

// A pass has lists as long as they have room for all active pairs: here 16 neurons' of 256.
TEST_F(CudaBackward, IsDenseFromOneActivePairTooMany) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock full(kind, 300, 24, 256, 0);
    for (int i = 0; i < 8; ++i) full.set_bias(17 * i, 3.5f);
    for (int t = 0; t < 300; ++t) full.x[t * 24 + 1] = to_bf16(0);
    TrainingBlock over = full;
    over.x[200 * 24 + 1] = to_bf16(7);
    over.deciding()[1 * 24 + 1] = to_bf16(8);
    check(full, "as many as there is room for", 128);
    check(over, "one more", 128);
    for (const Device& device : devices) {
      if (!cuda::is_hopper(device)) continue;
      for (const auto& [block, entries] : {std::pair(&full, 300 * 8), std::pair(&over, 0)}) {
        TrainingCall call(training_plan(block->problem, device, 128), *block);
        ASSERT_TRUE(call.run().ok());
        EXPECT_EQ(list_entries(call), entries);
      }
    }
  }
}

TEST_F(CudaBackward, MatchesFloat64AtUnevenPatterns) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock one_neuron(kind, 150, 72, 136, 0);
    one_neuron.set_bias(133, 3.5f);
    check(one_neuron, "one neuron for every token");

    TrainingBlock hot(kind, 200, 72, 264, 0.02);
    for (const int n : {0, 64, 127, 263}) hot.set_bias(n, 3.5f);
    check(hot, "hot neurons");

    TrainingBlock heavy_token(kind, 200, 64, 264, 0);
    heavy_token.x[77 * 64] = to_bf16(-8.0f);  // the bias, the other way round
    check(heavy_token, "one heavy token");

    for (const float bias : {-0.25f, 3.5f}) {  // active at times, in lists, and always, dense
      TrainingBlock one_block(kind, 300, 64, 776, 0);
      for (int n = 256; n < 512; ++n) one_block.set_bias(n, bias);
      check(one_block, "one block of neurons, bias " + std::to_string(bias));
    }

    TrainingBlock one_tile(kind, 300, 64, 136, 1);
    for (std::int64_t t = 0; t < 300; ++t) {
      if (t / 128 != 1) one_tile.x[t * 64] = to_bf16(-8.0f);
    }
    check(one_tile, "one busy tile");
  }
}

// As the forward's test of the same name.
TEST_F(CudaBackward, GathersAStepThatIsAdjacentAtItsEndsOnly) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock block(kind, 128, 72, 136, 1);
    for (std::int64_t t = 0; t < 128; ++t) block.x[t * 72 + 1] = to_bf16(t < 64 ? 0.0f : -8.0f);
    for (std::int64_t n = 0; n < 136; ++n) {
      block.deciding()[n * 72 + 1] = to_bf16(n == 0 || n == 10 ? 3.5f : 0.0f);
    }
    for (const double share : {0.0, kKeepAll}) {
      check(block, "neurons 0 and 10 of the first half alone", 0, share);
    }
  }
}

TEST_F(CudaBackward, TakesNoTokens) {
  for (const FfnKind kind : kKinds) check(TrainingBlock(kind, 0, 24, 72, 0.5), "none");
}

TEST_F(CudaBackward, SavesLittleAndLeavesItAsItWas) {
  const TrainingBlock block(FfnKind::kGated, 200, 72, 264, 0.1);
  for (const Device& device : devices) {
    TrainingCall call(training_plan(block.problem, device), block);
    // A bit for each half tile and neuron, in blocks of 256; and g and u of 14% of the
    // neurons, 64 in both tiles.
    const std::size_t masks = 4 * 512 / 8, counts = 3 * 256, columns = 2 * 64 * 128 * 2;
    EXPECT_EQ(call.forward.plan.saved_bytes, masks + counts + columns);
    ASSERT_TRUE(call.run().ok());
    const std::vector<std::uint32_t> saved = call.saved.download<std::uint32_t>();
    ASSERT_TRUE(ffn_backward(call.forward.plan, call.arguments()).ok());
    EXPECT_EQ(call.saved.download<std::uint32_t>(), saved);

    Call without(sparse_plan(block.problem, device), block);  // what is saved leaves y alone
    ASSERT_TRUE(without.run().ok());
    EXPECT_EQ(without.y.download<std::uint16_t>(), call.forward.y.download<std::uint16_t>());
  }
}

// It makes no difference for which tiles g and u are made anew, with room for none, some and all:
// they are the same sums, be they exact or not.
TEST_F(CudaBackward, GivesTheSameBitsWhateverIsKept) {
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.02, 0.4}) {
      TrainingBlock block(kind, 400, density < 0.1 ? 200 : 40, 264, density);
      if (density < 0.1) {
        for (bf16& v : block.x) v = to_bf16(to_float(v) / 3);
      }
      for (const Device& device : devices) {
        std::vector<std::vector<std::uint16_t>> want;
        for (const double share : {0.0, 0.3, 0.6, 1.0, kKeepAll}) {
          for (const int chunk_tokens : {256, 384}) {
            SCOPED_TRACE(name_of(block.problem, density) + " share " + std::to_string(share) +
                         " in chunks of " + std::to_string(chunk_tokens) + " as sm_" +
                         std::to_string(device.compute_capability));
            TrainingCall call(training_plan(block.problem, device, chunk_tokens, share), block);
            ASSERT_TRUE(call.run().ok());
            call.expect_guards_intact();
            auto got = call.gradients();
            got.resize(chunk_tokens == 256 ? 4 : 1);  // those of weights are summed in chunks
            if (want.empty()) want = got;
            for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], want[i]) << i;
          }
        }
      }
    }
  }
}

TEST_F(CudaBackward, EachOutputIsOptional) {
  for (const FfnKind kind : kKinds) {
    const TrainingBlock block(kind, 150, 24, 72, 0.3);
    for (const Device& device : devices) {
      const FfnPlan plan = training_plan(block.problem, device, 128);
      TrainingCall call(plan, block);
      const auto untouched = call.gradients();
      ASSERT_TRUE(call.run().ok());
      const auto all = call.gradients();
      for (int subset = 0; subset < 16; ++subset) {
        SCOPED_TRACE("subset " + std::to_string(subset));
        TrainingCall some(plan, block);
        ASSERT_TRUE(some.forward.run(nullptr, some.saved.as()).ok());
        FfnBackwardArgs args = some.arguments();
        if ((subset & 1) == 0) args.grad_x = nullptr;
        if ((subset & 2) == 0) args.grad_gate = nullptr;
        if ((subset & 4) == 0) args.grad_up = nullptr;
        if ((subset & 8) == 0) args.grad_down = nullptr;
        ASSERT_TRUE(ffn_backward(plan, args).ok());
        const auto got = some.gradients();
        for (int i = 0; i < 4; ++i) EXPECT_EQ(got[i], (subset >> i & 1 ? all : untouched)[i]) << i;
        some.expect_guards_intact();
      }
    }
  }
}

TEST_F(CudaBackward, TakesNoGradientOfL1AsZero) {
  TrainingBlock block(FfnKind::kGated, 70, 24, 72, 0.3);
  block.grad_l1 = 0;
  for (const Device& device : devices) {
    TrainingCall zero(training_plan(block.problem, device), block);
    ASSERT_TRUE(zero.run().ok());
    const auto want = zero.gradients();
    FfnBackwardArgs args = zero.arguments();
    args.grad_l1 = nullptr;
    zero.workspace.poison();
    ASSERT_TRUE(ffn_backward(zero.forward.plan, args).ok());
    EXPECT_EQ(zero.gradients(), want);
  }
}

// At u = 0 a neuron is active with h = 0, where the L1 term has no gradient.
TEST_F(CudaBackward, L1HasNoGradientAtZero) {
  TrainingBlock block(FfnKind::kGated, 70, 24, 72, 1);
  block.grad_l1 = 3;
  for (bf16& v : block.grad_y) v = to_bf16(0);
  for (int k = 0; k < 24; ++k) block.up[5 * 24 + k] = to_bf16(0);
  check(block, "L1 only", 0, kKeepAll);
  for (const Device& device : devices) {
    TrainingCall call(training_plan(block.problem, device), block);
    ASSERT_TRUE(call.run().ok());
    const std::vector<bf16> gate = call.grad_gate.download<bf16>();
    const std::vector<bf16> up = call.grad_up.download<bf16>();
    for (int n = 0; n < 72; ++n) {
      double size = 0;
      for (int k = 0; k < 24; ++k) {
        size += std::abs(to_float(gate[n * 24 + k])) + std::abs(to_float(up[n * 24 + k]));
      }
      EXPECT_EQ(size == 0, n == 5) << n;
    }
  }
}

// NaN where the dense block has NaN, an infinity where it has that, a number elsewhere.
void expect_same_class(const char* name, const DeviceBuffer& buffer,
                       const std::vector<double>& want) {
  const std::vector<bf16> got = buffer.download<bf16>();
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double value = to_float(got[i]);
    const bool same = std::isnan(want[i])   ? std::isnan(value)
                      : std::isinf(want[i]) ? value == want[i]
                                            : std::isfinite(value);
    ASSERT_TRUE(same) << "grad_" << name << " element " << i << ": " << value << ", wanted "
                      << want[i];
  }
}

void expect_same_classes(const TrainingCall& call, const Gradients& want) {
  expect_same_class("x", call.grad_x, want.x);
  expect_same_class("gate", call.grad_gate, want.gate);
  expect_same_class("up", call.grad_up, want.up);
  expect_same_class("down", call.grad_down, want.down);
}

TEST_F(CudaBackward, SpreadsNanAndInfinityAsDense) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const FfnKind kind : kKinds) {
    for (const float bad : {nan, infinity, -infinity}) {
      for (const double density : {0.0, 0.1}) {
        const TrainingBlock good(kind, 150, 24, 72, density);
        TrainingBlock bad_x = good, bad_dy = good, bad_both = good, bad_l1 = good;
        bad_x.x[2 * 24 + 3] = to_bf16(bad);
        bad_dy.grad_y[140 * 24 + 7] = to_bf16(bad);
        bad_both.x[2 * 24 + 3] = to_bf16(bad);
        bad_both.grad_y[2 * 24 + 9] = bad_both.grad_y[70 * 24] = to_bf16(bad);
        bad_l1.grad_l1 = bad;
        for (const TrainingBlock& block : {bad_x, bad_dy, bad_both, bad_l1}) {
          const Gradients want = dense_gradients(block, no_rounding);
          for (const Device& device : devices) {
            SCOPED_TRACE(name_of(block.problem, density) + ", value " + std::to_string(bad) +
                         " as sm_" + std::to_string(device.compute_capability));
            TrainingCall call(training_plan(block.problem, device, 0, kKeepAll), block);
            ASSERT_TRUE(call.run().ok());
            expect_same_classes(call, want);
          }
        }
      }
    }
  }
}

// A token of which every neuron is silent, with h = 0, and whose x still spreads: 0 · inf is NaN.
TEST_F(CudaBackward, SpreadsInfinityOfASilentToken) {
  TrainingBlock block(FfnKind::kPlain, 150, 24, 72, 0.1);
  block.x[140 * 24 + 3] = to_bf16(std::numeric_limits<float>::infinity());
  for (int n = 0; n < 72; ++n) block.up[n * 24 + 3] = to_bf16(-1);
  const Gradients want = dense_gradients(block, no_rounding);
  EXPECT_TRUE(std::isnan(want.up[3]));
  for (const Device& device : devices) {
    TrainingCall call(training_plan(block.problem, device, 0, kKeepAll), block);
    ASSERT_TRUE(call.run().ok());
    expect_same_classes(call, want);
  }
}

// Of a weight that does not decide, a NaN or an infinity makes NaNs for the silent tokens of the
// tile, whose 0 it meets. Lists leave them out, and all the more so those of a dy that is not
// finite.
TEST_F(CudaBackward, SpreadsNanOfSilentPairs) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {infinity, std::numeric_limits<float>::quiet_NaN()}) {
    TrainingBlock good(FfnKind::kGated, 100, 24, 264, 0.01);
    good.set_bias(40, 3.5f);
    good.x[50 * 24] = to_bf16(-8.0f);  // but for this token
    TrainingBlock bad_up = good, bad_down = good, bad_dy = good;
    bad_up.up[40 * 24 + 3] = to_bf16(bad);
    bad_down.down[40 * 24 + 3] = to_bf16(bad);
    for (int t = 0; t < 60; ++t) bad_dy.grad_y[t * 24 + 3] = to_bf16(bad);
    for (const TrainingBlock& block : {bad_up, bad_down, bad_dy}) {
      const Gradients want = dense_gradients(block, no_rounding);
      for (const Device& device : devices) {
        SCOPED_TRACE("value " + std::to_string(bad) + " as sm_" +
                     std::to_string(device.compute_capability));
        TrainingCall call(training_plan(block.problem, device, 0, kKeepAll), block);
        ASSERT_TRUE(call.run().ok());
        expect_same_classes(call, want);
        if (cuda::is_hopper(device)) {
          EXPECT_GT(list_entries(call), 0);
        }
      }
    }
  }
}

// Tokens of which every neuron is active, too many for lists.
TEST_F(CudaBackward, SpreadsNanOfManyTokens) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock block(kind, 300, 24, 72, 0.01);
    for (int t = 0; t < 300; t += 10) {
      block.x[t * 24 + 3] = to_bf16(std::numeric_limits<float>::quiet_NaN());
    }
    const Gradients want = dense_gradients(block, no_rounding);
    for (const Device& device : devices) {
      TrainingCall call(training_plan(block.problem, device, 128), block);
      ASSERT_TRUE(call.run().ok());
      expect_same_classes(call, want);
      if (cuda::is_hopper(device)) {
        EXPECT_EQ(list_entries(call), 0);
      }
    }
  }
}

// A NaN of the first round stays in a dense pass's sums through those that follow.
TEST_F(CudaBackward, KeepsNanInDenseSums) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock block(kind, 600, 24, 72, 0.5);
    block.x[5 * 24 + 3] = to_bf16(std::numeric_limits<float>::quiet_NaN());
    const Gradients want = dense_gradients(block, no_rounding);
    for (const Device& device : devices) {
      TrainingCall call(training_plan(block.problem, device, 128), block);
      ASSERT_TRUE(call.run().ok());
      expect_same_classes(call, want);
      if (cuda::is_hopper(device)) {
        EXPECT_EQ(list_entries(call), 0);
      }
    }
  }
}

// It makes the neuron active for the tokens beyond the last one too, which must not be read.
TEST_F(CudaBackward, SpreadsNanOfADecidingWeight) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock block(kind, 150, 24, 72, 0.1);
    block.set_bias(40, std::numeric_limits<float>::quiet_NaN());
    const Gradients want = dense_gradients(block, no_rounding);
    for (const Device& device : devices) {
      for (const double share : {0.0, kKeepAll}) {
        TrainingCall call(training_plan(block.problem, device, 0, share), block);
        ASSERT_TRUE(call.run().ok());
        expect_same_classes(call, want);
      }
    }
    TrainingBlock alone(kind, 150, 24, 72, 0);
    alone.set_bias(40, std::numeric_limits<float>::quiet_NaN());
    for (const Device& device : devices) {
      if (!cuda::is_hopper(device)) continue;
      TrainingCall call(training_plan(alone.problem, device), alone);
      ASSERT_TRUE(call.run().ok());
      EXPECT_EQ(list_entries(call), 150);
    }
  }
}

// What gradients hold before a pass adds to them: about their size, and eighths, so that exact sums
// stay exact.
std::vector<bf16> old_gradients(const TrainingBlock& block) {
  std::mt19937_64 random(13);
  std::vector<bf16> values(block.up.size());
  for (bf16& v : values) v = to_bf16((static_cast<float>(random() % 255) - 127) / 8);
  return values;
}

// By lists and, on Hopper, dense; in one round and in many.
TEST_F(CudaBackward, AddsToWhatTheGradientsHold) {
  for (const FfnKind kind : kKinds) {
    for (const double density : {0.0, 0.01, 0.5}) {
      for (const std::int64_t tokens : {0, 1, 600}) {
        TrainingBlock block(kind, tokens, 72, 264, density);
        block.set_bias(70, -3.5f);
        for (const int chunk_tokens : {0, 128}) {
          check(block, name_of(block.problem, density) + " in chunks", chunk_tokens, kAsPlanned,
                old_gradients(block));
        }
      }
    }
  }
}

TEST_F(CudaBackward, RoundsOnceWhenItAccumulates) {
  for (const FfnKind kind : kKinds) {
    const TrainingBlock block(kind, 600, 8, 72, 0.5);
    for (const int chunk_tokens : {0, 128}) {
      check_exact(block.problem, chunk_tokens, kAsPlanned, old_gradients(block));
    }
  }
}

TEST_F(CudaBackward, AccumulatesOnlyWhatIsWantedWithTheSameBits) {
  for (const double density : {0.01, 0.5}) {
    const TrainingBlock block(FfnKind::kGated, 600, 24, 72, density);
    const std::vector<bf16> old = old_gradients(block);
    for (const Device& device : devices) {
      const FfnPlan plan = training_plan(block.problem, device, 128);
      TrainingCall call(plan, block);
      call.accumulate_into(old);
      ASSERT_TRUE(call.run().ok());
      TrainingCall some(plan, block);
      some.accumulate_into(old);
      const auto before = some.gradients();
      ASSERT_TRUE(some.forward.run(nullptr, some.saved.as()).ok());
      FfnBackwardArgs args = some.arguments();
      args.grad_x = args.grad_up = nullptr;
      ASSERT_TRUE(ffn_backward(plan, args).ok());
      const auto all = call.gradients(), got = some.gradients();
      for (const int i : {0, 2}) EXPECT_EQ(got[i], before[i]) << i;
      for (const int i : {1, 3}) EXPECT_EQ(got[i], all[i]) << i;
      some.expect_guards_intact();
    }
  }
}

// Of a gradient, and of what is added to it: active pairs, and silent ones.
TEST_F(CudaBackward, AccumulatesNanAndInfinity) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const double density : {0.01, 0.5}) {
    TrainingBlock good(FfnKind::kGated, 600, 24, 72, density);
    good.set_bias(40, 3.5f);
    good.x[50 * 24] = to_bf16(-8.0f);  // but for this token
    std::vector<bf16> old = old_gradients(good);
    old[3] = to_bf16(nan);
    old[40 * 24 + 4] = to_bf16(infinity);
    old[71 * 24 + 5] = to_bf16(-infinity);
    TrainingBlock bad_x = good, bad_up = good;
    bad_x.x[5 * 24 + 3] = to_bf16(nan);
    bad_up.up[40 * 24 + 3] = to_bf16(infinity);
    for (const TrainingBlock& block : {good, bad_x, bad_up}) {
      const Gradients want = dense_gradients(block, no_rounding).added_to(old, no_rounding);
      for (const Device& device : devices) {
        SCOPED_TRACE(name_of(block.problem, density) + " as sm_" +
                     std::to_string(device.compute_capability));
        TrainingCall call(training_plan(block.problem, device, 128), block);
        call.accumulate_into(old);
        ASSERT_TRUE(call.run().ok());
        expect_same_classes(call, want);
        if (cuda::is_hopper(device)) {
          EXPECT_EQ(list_entries(call) == 0, density == 0.5);
        }
      }
    }
  }
}

TEST_F(CudaBackward, LeavesTheWeightsOfASilentNeuronUnread) {
  for (const FfnKind kind : kKinds) {
    TrainingBlock good(kind, 150, 24, 72, 0.3);
    good.set_bias(7, -3.5f);
    TrainingBlock bad = good;
    bad.down[7 * 24 + 3] = to_bf16(std::numeric_limits<float>::infinity());
    if (good.gated()) bad.up[7 * 24 + 3] = to_bf16(std::numeric_limits<float>::quiet_NaN());
    for (const Device& device : devices) {
      const FfnPlan plan = training_plan(good.problem, device, 0, kKeepAll);
      TrainingCall clean(plan, good), got(plan, bad);
      ASSERT_TRUE(clean.run().ok());
      ASSERT_TRUE(got.run().ok());
      EXPECT_EQ(got.gradients(), clean.gradients());
    }
  }
}

TEST_F(CudaBackward, IsBitwiseReproducible) {
  for (const double density : {0.01, 0.1}) {  // in lists, dense
    const TrainingBlock block(FfnKind::kGated, 300, 40, 136, density);
    for (const Device& device : devices) {
      TrainingCall call(training_plan(block.problem, device, 256, 0.5), block);
      ASSERT_TRUE(call.run().ok());
      const auto want = call.gradients();
      for (int run = 0; run < 3; ++run) {
        call.poison();
        ASSERT_TRUE(call.run().ok());
        EXPECT_EQ(call.gradients(), want);
      }
    }
  }
}

TEST_F(CudaBackward, RefusesByName) {
  const TrainingBlock block(FfnKind::kGated, 16, 24, 72, 0.5);
  TrainingCall call(training_plan(block.problem, devices[0]), block);
  const std::pair<const char*, void * FfnBackwardArgs::*> gradients[] = {
      {"grad_x", &FfnBackwardArgs::grad_x},
      {"grad_gate", &FfnBackwardArgs::grad_gate},
      {"grad_up", &FfnBackwardArgs::grad_up},
      {"grad_down", &FfnBackwardArgs::grad_down}};
  for (const auto& [name, gradient] : gradients) {
    FfnBackwardArgs args = call.arguments();
    args.*gradient = static_cast<bf16*>(args.*gradient) + 1;
    const Status status = ffn_backward(call.forward.plan, args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(
        status.message().find(std::string(name) + " is at an address of remainder 2 modulo 16"),
        std::string::npos)
        << status.message();
  }
}

}  // namespace
}  // namespace twell
