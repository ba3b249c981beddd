#pragma once
// What the tests of whole calls on the simulator share.

#include <gtest/gtest.h>

#include "cuda/support.h"
#include "simulator.h"

namespace twell {

// Tests that change the simulator's settings.
class SimulatedTest : public GpuTest {
 protected:
  void TearDown() override { cuda_sim::settings = saved_; }

  // run() with every choice that the simulator offers.
  template <class Run>
  static void with_every_choice(Run&& run) {
    for (const bool descending : {false, true}) {
      for (const bool early_copies : {false, true}) {
        cuda_sim::settings = {descending, early_copies};
        run();
      }
    }
  }

 private:
  const cuda_sim::Settings saved_ = cuda_sim::settings;
};

}  // namespace twell
