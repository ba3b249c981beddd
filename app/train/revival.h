#pragma once
// A new start for neurons that have died. A neuron whose gate is never positive gets no gradient,
// so it stays silent for the rest of the run unless its gate row is drawn anew.

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "app/model/llama.h"
#include "app/train/optimizer.h"

namespace twell::app {

class Revival {
 public:
  // Neurons that have not fired for `after` steps are revived, at most a sixteenth of `after`
  // later; 0: none ever are. `seed` and the step alone decide the new rows, so that a resumed run
  // draws the same ones.
  Revival(int64_t after, uint64_t seed, const Llama& model);

  // To be called after each optimizer step. `step` counts the steps done, this one included;
  // `activity` holds per layer the tokens of the step for which each neuron was active, [neurons]
  // integer. The gate row of a revived neuron is drawn as at the start of a run, from
  // normal(0, initializer_range); the optimizer forgets what it knew of the neuron's gate, up and
  // down rows. Returns the neurons revived per layer. Looking for them waits for the device.
  std::vector<int64_t> step(int64_t step, const std::vector<torch::Tensor>& activity, Llama& model,
                            AdamW& optimizer);

  // int32 on the model's device, one layer's neurons after the other's: steps since the neuron
  // fired or was revived. It is this class's own memory, for checkpoints to write and to fill.
  torch::Tensor idle() const { return idle_; }

 private:
  int64_t after_;
  uint64_t seed_;
  torch::Tensor idle_;
  int64_t next_check_ = 0;  // no neuron can be idle for `after_` steps before this one
};

}  // namespace twell::app
