#include "app/bench/patterned_ffn.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "app/error.h"

namespace twell::app {
namespace {

constexpr double kSpike = 8;        // the spike's share of the projection, in standard deviations
constexpr double kSpikeWeight = 4;  // reserved weights, in standard deviations of the others
constexpr double kReservedNoise = 0.1;
constexpr std::int64_t kTile = 128;

torch::Generator generator(std::uint64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

torch::Tensor randn(torch::IntArrayRef shape, const torch::Generator& random) {
  return torch::randn(shape, random, torch::kFloat32);
}

}  // namespace

Trace random_pattern(std::int64_t tokens, std::int64_t neurons, double density,
                     std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::bernoulli_distribution fires(density);
  Trace pattern;
  pattern.neurons = neurons;
  pattern.rate.assign(neurons, static_cast<float>(density));
  std::vector<std::uint16_t> active;
  for (std::int64_t token = 0; token < tokens; ++token) {
    active.clear();
    for (std::int64_t n = 0; n < neurons; ++n) {
      if (fires(random)) active.push_back(static_cast<std::uint16_t>(n));
    }
    pattern.append(active);
  }
  return pattern;
}

Trace window(const Trace& trace, std::int64_t first, std::int64_t count) {
  Trace rows;
  rows.layer = trace.layer;
  rows.neurons = trace.neurons;
  rows.rate = trace.rate;
  for (std::int64_t i = first; i < first + count; ++i) rows.append(trace.row(i % trace.tokens()));
  return rows;
}

torch::Tensor dense_pattern(const Trace& pattern) {
  const torch::Tensor active = torch::zeros({pattern.tokens(), pattern.neurons}, torch::kBool);
  bool* cells = active.data_ptr<bool>();
  for (std::int64_t token = 0; token < pattern.tokens(); ++token) {
    for (const std::uint16_t neuron : pattern.row(token)) {
      cells[token * pattern.neurons + neuron] = true;
    }
  }
  return active;
}

std::int64_t max_distinct_tokens(std::int64_t hidden) {
  const std::int64_t half = hidden / 2;
  return half < kTile ? half : half / kTile * kTile;
}

FfnTensors random_ffn(FfnKind kind, std::int64_t hidden, std::int64_t neurons, std::uint64_t seed) {
  const torch::Generator random = generator(seed);
  const std::int64_t projections = kind == FfnKind::kGated ? 2 : 1;
  const double scale = 1 / std::sqrt(static_cast<double>(hidden));
  return {(randn({projections * neurons, hidden}, random) * scale).to(torch::kBFloat16),
          (randn({neurons, hidden}, random) * scale).to(torch::kBFloat16)};
}

PatternedFfn::PatternedFfn(const FfnTensors& base, FfnKind kind, const Trace& rows,
                           std::int64_t tokens, std::uint64_t seed)
    : kind(kind), pattern(rows), gate_up(base.gate_up.clone()), down(base.down.clone()) {
  const std::int64_t reserved = pattern.tokens();
  const std::int64_t hidden = down.size(1);
  if (reserved < 1 || reserved > max_distinct_tokens(hidden)) {
    throw Error("a pattern of " + std::to_string(reserved) + " tokens does not fit hidden size " +
                std::to_string(hidden) + "; 1 to " + std::to_string(max_distinct_tokens(hidden)) +
                " are permitted");
  }
  if (pattern.neurons != neurons()) {
    throw Error("the pattern has " + std::to_string(pattern.neurons) + " neurons, the FFN has " +
                std::to_string(neurons()));
  }
  const double weight = kSpikeWeight / std::sqrt(static_cast<double>(hidden));
  const torch::Tensor signs =
      torch::where(dense_pattern(pattern).t(), weight, -weight);  // [neurons, reserved]
  gate_up.narrow(0, 0, neurons()).narrow(1, 0, reserved).copy_(signs);
  down_transposed = down.t().contiguous();

  torch::Tensor input = randn({tokens, hidden}, generator(seed));
  input.narrow(1, 0, reserved).mul_(kReservedNoise);
  const torch::Tensor token = torch::arange(tokens);
  input.index_put_({token, token.remainder(reserved)}, torch::tensor(kSpike / weight));
  x = input.to(torch::kBFloat16);
}

bool PatternedFfn::pattern_matches() const {
  const std::int64_t reserved = pattern.tokens();
  const torch::Tensor expected = dense_pattern(pattern).to(x.device());
  for (std::int64_t first = 0; first < x.size(0); first += reserved) {
    const std::int64_t count = std::min(reserved, x.size(0) - first);
    const torch::Tensor active = torch::linear(x.narrow(0, first, count), gate()).gt(0);
    if (!active.equal(expected.narrow(0, 0, count))) return false;
  }
  return true;
}

void PatternedFfn::to(const torch::Device& device) {
  for (torch::Tensor* tensor : {&x, &gate_up, &down, &down_transposed}) {
    *tensor = tensor->to(device);
  }
}

}  // namespace twell::app
