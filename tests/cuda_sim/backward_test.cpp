// Whole training steps, with every choice that the simulator offers.

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda/backward_call.h"
#include "simulated.h"

namespace twell {
namespace {

using SimulatedBackward = SimulatedTest;

TEST_F(SimulatedBackward, GivesTheSameBitsWithEveryChoice) {
  for (const std::int64_t tokens : {13, 200}) {
    const TrainingBlock block(FfnKind::kGated, tokens, 72, 264, 0.05);
    std::vector<std::vector<std::uint16_t>> want;
    with_every_choice([&] {
      TrainingCall call(training_plan(block.problem, devices[0], 128, 0.5), block);
      const Status status = call.run();
      ASSERT_TRUE(status.ok()) << status.message();
      if (want.empty()) want = call.gradients();
      EXPECT_EQ(call.gradients(), want);
    });
  }
}

TEST_F(SimulatedBackward, ReadsOperandsWithoutBankConflicts) {
  const TrainingBlock block(FfnKind::kGated, 200, 136, 264, 0.5);
  TrainingCall call(training_plan(block.problem, devices[0]), block);
  cuda_sim::counters = {};
  ASSERT_TRUE(call.run().ok());
  EXPECT_GT(cuda_sim::counters.matrix_loads, 0);
  EXPECT_EQ(cuda_sim::counters.bank_conflicts, 0);
}

}  // namespace
}  // namespace twell
