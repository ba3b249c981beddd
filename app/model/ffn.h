#pragma once
// The gated feed-forward block on libtorch: one autograd function over twell's operators and over
// the dense products, and the choice between the two.

#include <torch/torch.h>

#include <cstdint>
#include <string>

#include "app/model/gated_relu.h"
#include "app/util/transfer.h"
#include "twell/ffn.h"

namespace twell::app {

// How the program runs its FFNs: always dense, always by twell's operators, or each layer as the
// planner advises for the density that was measured.
enum class FfnMode { kDense, kTwell, kAuto };

FfnMode parse_ffn_mode(const std::string& name);  // "dense", "twell", "auto"; else Error
const char* name_of(FfnMode mode);

// g = relu(x Gᵀ), u = x Uᵀ, h = g ⊙ u, y = h D. All [neurons, hidden], contiguous, of one dtype;
// `down` is neuron-major.
struct FfnWeights {
  torch::Tensor gate, up, down;
};

struct FfnOutput {
  torch::Tensor y;  // [tokens, hidden], the dtype of x
  // Counts that were not asked for may be undefined.
  torch::Tensor l1;        // Σ |h|, a float32 (for float64: float64) scalar; differentiable
  torch::Tensor l0;        // number of (token, neuron) pairs with g > 0, an int64 scalar
  torch::Tensor activity;  // [neurons] int32: tokens for which the neuron was active
  FfnPath path;            // what ran: kDense or kSparse
};

// The block on x [tokens, hidden], differentiable in x and the weights through y and l1. `path` is
// kDense (libtorch's products) or kSparse (twell::ffn_forward); both count the same things.
FfnOutput relu_ffn(const torch::Tensor& x, const FfnWeights& weights, FfnPath path,
                   FfnCounts counts = FfnCounts::kAll);

// silu(x Gᵀ) ⊙ (x Uᵀ) D, dense, with nothing counted: for checkpoints that are not sparse.
torch::Tensor silu_ffn(const torch::Tensor& x, const FfnWeights& weights);

// How many neurons are active: on the mean for a token, and for any token of a tile of 128.
struct FfnDensity {
  double active = -1;  // < 0: not known
  double tile_union = -1;
};

// Queues the measurement of up to four tiles of consecutive tokens, evenly spread over x [tokens,
// hidden], by one small dense product: at most an eighth of the tokens, but one tile at least. The
// numbers are those of an FfnDensity; undefined without tokens.
Readback measure_density(const torch::Tensor& x, const torch::Tensor& gate);

// The planner's advice for x [tokens, hidden] and a gated block with `neurons` neurons at that
// density. Throws Error by name for what twell does not support.
FfnPlan plan_for(const torch::Tensor& x, int64_t neurons, FfnPath path, bool training,
                 const FfnDensity& density);

// One layer's choice in FfnMode::kAuto. It measures every kInterval observations, keeps a running
// mean and asks the planner. A measurement counts from the one after it on: by then it has long
// reached the host, so that nothing waits for the device, and the choice depends on no timing. The
// very first is waited for. Plain state, stored in training checkpoints so that a resumed run
// chooses alike.
struct FfnChooser {
  static constexpr int64_t kInterval = 16;  // a measurement costs under 1/100 of such a stretch
  static constexpr double kMemory = 0.5;    // weight of the past in the running mean
  static constexpr double kMargin = 0.05;   // what sparse must gain before a layer leaves dense

  int64_t calls = 0;
  FfnDensity density;
  Readback measured;    // not yet part of `density`
  bool sparse = false;  // the last choice, kept as long as the planner would choose it

  // Measures now and then, in FfnMode::kAuto.
  void observe(const torch::Tensor& x, const FfnWeights& weights, FfnMode mode);
  // The path for x [tokens, hidden], for the density observed so far; host work only.
  FfnPath choose(const torch::Tensor& x, const FfnWeights& weights, FfnMode mode, bool training);
};

}  // namespace twell::app
