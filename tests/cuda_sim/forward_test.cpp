// Whole forwards, with every choice that the simulator offers.

#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda/forward_call.h"
#include "simulated.h"

namespace twell {
namespace {

using SimulatedForward = SimulatedTest;

TEST_F(SimulatedForward, GivesTheSameBitsWithEveryChoice) {
  for (const std::int64_t tokens : {13, 200}) {
    const Block block(FfnKind::kGated, tokens, 136, 520, 0.05);
    std::optional<std::vector<bf16>> y;
    std::optional<float> l1;
    with_every_choice([&] {
      Call call(sparse_plan(block.problem, devices[0]), block);
      const Status status = call.run();
      ASSERT_TRUE(status.ok()) << status.message();
      const std::vector<bf16> got = call.y.download<bf16>();
      if (!y) {
        y = got;
        l1 = call.l1.download<float>()[0];
      }
      EXPECT_EQ(std::memcmp(got.data(), y->data(), got.size() * sizeof(bf16)), 0);
      EXPECT_EQ(call.l1.download<float>()[0], *l1);
    });
  }
}

TEST_F(SimulatedForward, ReadsOperandsWithoutBankConflicts) {
  const Block block(FfnKind::kGated, 200, 136, 520, 0.5);
  Call call(sparse_plan(block.problem, devices[0]), block);
  cuda_sim::counters = {};
  ASSERT_TRUE(call.run().ok());
  EXPECT_GT(cuda_sim::counters.matrix_loads, 0);
  EXPECT_EQ(cuda_sim::counters.bank_conflicts, 0);
}

}  // namespace
}  // namespace twell
