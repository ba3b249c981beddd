// Runs the tests twice: with one choice of what a GPU leaves open, then with the other.

#include <gtest/gtest.h>

#include "simulator.h"

namespace {

class Choices : public testing::EmptyTestEventListener {
  void OnTestIterationStart(const testing::UnitTest&, int iteration) override {
    const bool other = iteration % 2 == 1;
    cuda_sim::settings = {.descending = other, .early_copies = other};
  }
};

}  // namespace

int main(int argc, char** argv) {
  GTEST_FLAG_SET(repeat, 2);
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new Choices);  // which then owns it
  return RUN_ALL_TESTS();
}
