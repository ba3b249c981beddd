#pragma once
// Times twell's FFN against PyTorch's dense one, in one process on the same inputs.

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "app/trace/trace.h"
#include "twell/ffn.h"

namespace twell::app {

struct FfnBenchOptions {
  FfnKind kind = FfnKind::kGated;
  FfnPath path = FfnPath::kSparse;  // kSparse: forced; kAuto: as the planner decides
  std::int64_t tokens = 512;
  std::int64_t hidden = 2048;
  std::int64_t neurons = 5632;
  double seconds = 8;  // of timing, about
  std::uint64_t seed = 1;
  torch::Device device = torch::kCPU;
};

// Runs the case `name` with tokens that follow `pattern`. Before timing, it checks that PyTorch's
// own projection has exactly that pattern, that twell counts the same active neurons, and that
// twell's error against float64 is at most 1.1 times that of PyTorch's bf16 block; otherwise it
// throws Error.
//
// Weights: several copies in rotation, more than the last-level cache holds, each with its own
// window of the pattern, so that weights come from memory as they do in a model of many layers.
// Every round runs each variant once, each on another copy; times are medians over rounds.
//   dense: y = linear(relu(x Gᵀ) ⊙ x Uᵀ, down_proj), with two projections or one concatenated; the
//          faster one counts (plain: the only form)
//   twell: the operator twell::ffn_forward
// Fields: case, ffn_kind, tokens, hidden, neurons, path, dense_ms, twell_ms, ratio, the times of
// each dense form, 10th and 90th percentiles, the achieved pattern, errors, rounds, weight copies.
nlohmann::ordered_json bench_ffn(const std::string& name, const Trace& pattern,
                                 const FfnBenchOptions& options);

}  // namespace twell::app
