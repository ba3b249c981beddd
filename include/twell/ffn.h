#pragma once
// The sparse feed-forward block (FFN), forward and backward.
//
//   gated:  g = relu(x Gᵀ)   u = x Uᵀ   h = g ⊙ u   y = h D
//   plain:                              h = relu(x Uᵀ)   y = h D
//
//   x [tokens, hidden]   G, U, D [neurons, hidden]   y [tokens, hidden]
//
// All tensors are row-major and dense; D is neuron-major (the transpose of the usual down_proj
// weight), so that neuron n owns one row of G, U and D. With DType::kBf16, g (plain: h) is rounded
// to bf16, products are accumulated in float32 and h is rounded to bf16; with float32 and float64
// nothing is rounded below the type.
//
// Nothing here allocates, synchronises, prints or keeps state: the caller passes a workspace and,
// on CUDA, a stream. Results are exact at every density and bitwise reproducible on the same
// machine for any number of threads. A token whose x holds a NaN or an infinity counts every
// neuron as active, so that 0 · inf spreads exactly as it does in the dense block.
//
// Not so in a weight. A NaN in the row that decides (G; plain: U) makes the neuron active for every
// token, and whatever is in an active neuron's rows reaches its tokens, as in the dense block. But
// the other rows of a neuron that no token of a tile activates are not read: a NaN or an infinity
// there leaves the tile's y and gradients as they are, where the dense block's 0 · inf is NaN. If
// some tokens of the tile activate the neuron, the tile's other tokens may get that NaN or not.

#include <cstddef>
#include <cstdint>
#include <string>

#include "twell/device.h"
#include "twell/status.h"
#include "twell/types.h"

namespace twell {

enum class FfnKind : std::uint8_t { kGated, kPlain };

// How the caller wants it run, and what the planner decided (never kAuto in a plan).
// kDense means: the three dense products of the caller's own BLAS; ffn_forward refuses it.
enum class FfnPath : std::uint8_t { kAuto, kDense, kSparse };

const char* name_of(FfnKind kind);
const char* name_of(FfnPath path);

struct FfnProblem {
  FfnKind kind = FfnKind::kGated;
  DType dtype = DType::kBf16;
  std::int64_t tokens = 0;   // M ≥ 0
  std::int64_t hidden = 0;   // K: a positive multiple of 8
  std::int64_t neurons = 0;  // N: a positive multiple of 8, at most 65,536
};

struct PlanOptions {
  FfnPath path = FfnPath::kAuto;
  bool training = false;        // the forward saves for a backward
  double expected_active = -1;  // mean active neurons per token, if known; < 0: unknown
  double expected_union = -1;   // mean active neurons per 128-token tile, if known; < 0: unknown
};

// What will run. Plain data, made on the host without touching the device.
struct FfnPlan {
  FfnProblem problem;
  Device device;
  FfnPath path = FfnPath::kSparse;
  bool training = false;

  int tile_tokens = 0;            // tokens that share one union
  std::int64_t chunk_tokens = 0;  // tokens whose intermediates are alive at once
  int block_neurons = 0;          // neurons of one unit of gate work
  // In a tile, a neuron active for at least this many tokens takes part in the dense product over
  // the union; one active for fewer is computed row by row.
  int heavy_tokens = 0;

  std::size_t workspace_bytes = 0;           // for ffn_forward
  std::size_t backward_workspace_bytes = 0;  // for ffn_backward (0 if not training)
  std::size_t saved_bytes = 0;               // what forward keeps for backward (0 if not training)

  double predicted_dense_ms = 0;  // of the forward; if training, of forward and backward
  double predicted_sparse_ms = 0;

  std::string to_string() const;  // a few lines for people
};

// Refuses by name what is not supported; otherwise the plan holds for every input of that shape.
Result<FfnPlan> plan_ffn(const FfnProblem& problem, const Device& device,
                         const PlanOptions& options = {});

struct FfnWeights {
  const void* gate = nullptr;  // [neurons, hidden]; null for a plain block
  const void* up = nullptr;    // [neurons, hidden]
  const void* down = nullptr;  // [neurons, hidden], neuron-major
};

// Optional counts of a forward pass; null where not wanted. Written, not accumulated.
struct FfnStats {
  std::int64_t* l0 = nullptr;        // number of (token, neuron) pairs with h's gate > 0
  void* l1 = nullptr;                // Σ |h|: float32, or float64 for DType::kFloat64
  std::int32_t* activity = nullptr;  // [neurons] tokens for which the neuron was active
};

struct FfnForwardArgs {
  const void* x = nullptr;  // [tokens, hidden]
  FfnWeights weights;
  void* y = nullptr;  // [tokens, hidden], overwritten
  FfnStats stats;
  void* saved = nullptr;      // plan.saved_bytes, 64-byte aligned; null unless plan.training
  void* workspace = nullptr;  // plan.workspace_bytes, 64-byte aligned; contents need not be kept
  void* stream = nullptr;     // cudaStream_t; ignored on the CPU
};

Status ffn_forward(const FfnPlan& plan, const FfnForwardArgs& args);

// On CUDA all tensors are 16-byte aligned, and the gradients of the weights also hold intermediate
// values while the pass runs.
//
// With L = loss: given dL/dy and dL/d(Σ|h|), writes dL/dx, dL/dG, dL/dU, dL/dD in the problem's
// dtype. d|h|/dh at h = 0 is 0; d relu(g)/dg at g = 0 is 0, as in PyTorch.
struct FfnBackwardArgs {
  const void* grad_y = nullptr;   // [tokens, hidden]
  const void* grad_l1 = nullptr;  // one number, of the type of FfnStats::l1; null: 0
  const void* x = nullptr;        // [tokens, hidden], as in the forward
  FfnWeights weights;             // as in the forward
  const void* saved = nullptr;    // as written by the forward of the same plan
  void* grad_x = nullptr;         // [tokens, hidden]; each may be null if not wanted
  void* grad_gate = nullptr;      // [neurons, hidden]
  void* grad_up = nullptr;        // [neurons, hidden]
  void* grad_down = nullptr;      // [neurons, hidden]
  // grad_gate, grad_up and grad_down += instead of =, for a batch that comes in parts: what they
  // hold is added to the sums before these are rounded. grad_x is written all the same.
  bool accumulate = false;
  void* workspace = nullptr;  // plan.backward_workspace_bytes, 64-byte aligned
  void* stream = nullptr;
};

Status ffn_backward(const FfnPlan& plan, const FfnBackwardArgs& args);

}  // namespace twell
