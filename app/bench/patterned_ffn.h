#pragma once
// FFN weights and inputs whose activation pattern is given: neuron n is active for token t exactly
// where the pattern says so.

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "app/trace/trace.h"
#include "twell/ffn.h"

namespace twell::app {

// A pattern in which each neuron is active for each token with probability `density`,
// independently.
Trace random_pattern(std::int64_t tokens, std::int64_t neurons, double density, std::uint64_t seed);

// The rows [first, first + count) of `trace`, starting again from row 0 past its end.
Trace window(const Trace& trace, std::int64_t first, std::int64_t count);

// [pattern.tokens(), pattern.neurons] bool
torch::Tensor dense_pattern(const Trace& pattern);

// How many tokens can have patterns of their own at this width: half of the columns.
std::int64_t max_distinct_tokens(std::int64_t hidden);

// Without patterns: the random weights that every PatternedFfn starts from, bf16.
struct FfnTensors {
  torch::Tensor gate_up;  // [2 neurons, hidden], gate first; plain: up alone, [neurons, hidden]
  torch::Tensor down;     // [neurons, hidden]
};

FfnTensors random_ffn(FfnKind kind, std::int64_t hidden, std::int64_t neurons, std::uint64_t seed);

// x [tokens, hidden] and weights such that the projection that decides (gate; plain: up) is
// positive exactly where `pattern` is, token t having row t mod pattern.tokens().
//
// Construction: D = pattern.tokens() columns are reserved. In them, x_t is a small noise but for a
// spike in column t mod D, and the weight of neuron n in column d is ±: plus where n is active in
// row d. All other columns are Gaussian and contribute at most a standard deviation of about 1, the
// reserved ones' noise at most 0.3; the spike contributes ±8. The pattern survives any order of
// summation; pattern_matches() checks it all the same.
struct PatternedFfn {
  PatternedFfn(const FfnTensors& base, FfnKind kind, const Trace& pattern, std::int64_t tokens,
               std::uint64_t seed);

  FfnKind kind;
  Trace pattern;
  torch::Tensor x;
  torch::Tensor gate_up;
  torch::Tensor down;             // [neurons, hidden], as twell wants it
  torch::Tensor down_transposed;  // [hidden, neurons], contiguous: down_proj as PyTorch has it

  std::int64_t neurons() const { return down.size(0); }
  torch::Tensor gate() const { return gate_up.narrow(0, 0, neurons()); }  // plain: up
  torch::Tensor up() const { return gate_up.narrow(0, gate_up.size(0) - neurons(), neurons()); }

  // Whether PyTorch's own projection is positive exactly where the pattern is, for every token.
  bool pattern_matches() const;
  void to(const torch::Device& device);
};

}  // namespace twell::app
