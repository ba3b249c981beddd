#include "app/bench/ffn_bench.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <tuple>
#include <vector>

#include "app/bench/patterned_ffn.h"
#include "app/bench/timer.h"
#include "app/error.h"
#include "app/trace/statistics.h"

namespace twell::app {
namespace {

using torch::Tensor;

constexpr std::int64_t kTile = 128;
constexpr std::int64_t kFallbackCacheBytes = std::int64_t{256} << 20;
constexpr std::int64_t kMinCopies = 8;
constexpr std::int64_t kMaxCopies = 64;
constexpr std::int64_t kMaxErrorTokens = 512;  // checked against float64

struct TwellOutput {
  Tensor y, activity;
};

TwellOutput run_twell(const Tensor& x, const PatternedFfn& ffn) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("twell::ffn_forward", "").typed<Signature>();
  const auto gate = ffn.kind == FfnKind::kGated ? std::optional(ffn.gate()) : std::nullopt;
  auto [y, l0, l1, activity, saved] =
      op.call(x, gate, ffn.up(), ffn.down, /*save=*/false, /*count=*/true);
  return {y, activity};
}

Tensor run_separate(const Tensor& x, const PatternedFfn& ffn) {
  Tensor h = torch::linear(x, ffn.gate()).relu_();  // [tokens, neurons]
  if (ffn.kind == FfnKind::kGated) h.mul_(torch::linear(x, ffn.up()));
  return torch::linear(h, ffn.down_transposed);
}

Tensor run_concatenated(const Tensor& x, const PatternedFfn& ffn) {
  const Tensor both = torch::linear(x, ffn.gate_up);  // [tokens, 2 neurons]
  const std::int64_t n = ffn.neurons();
  return torch::linear(both.narrow(1, 0, n).relu() * both.narrow(1, n, n), ffn.down_transposed);
}

struct Variant {
  std::string name;
  std::function<Tensor(const Tensor& x, const PatternedFfn& ffn)> run;
  std::vector<double> ms{};

  double quantile(double q) const { return app::quantile(ms, q); }
};

// ‖y - exact‖ / ‖exact‖ of y against the block in float64; ‖y‖ if nothing is active.
double relative_error(const Tensor& y, const Tensor& exact) {
  const Tensor reference = exact.to(y.device());
  const double size = reference.norm().item<double>();
  const double error = (y.to(torch::kFloat64) - reference).norm().item<double>();
  return size > 0 ? error / size : error;
}

Tensor run_exact(const Tensor& x, const PatternedFfn& ffn) {
  const auto wide = [](const Tensor& t) { return t.cpu().to(torch::kFloat64); };
  Tensor h = torch::linear(wide(x), wide(ffn.gate())).relu_();
  if (ffn.kind == FfnKind::kGated) h.mul_(torch::linear(wide(x), wide(ffn.up())));
  return torch::matmul(h, wide(ffn.down));
}

std::int64_t cache_bytes() {
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : kFallbackCacheBytes;
}

// Enough copies that the last-level cache has forgotten one before its turn comes again, within a
// third of the free memory.
std::int64_t copy_count(const FfnBenchOptions& options) {
  const std::int64_t matrices = options.kind == FfnKind::kGated ? 3 : 2;
  const std::int64_t read = matrices * options.neurons * options.hidden * 2;
  const std::int64_t held = read + options.neurons * options.hidden * 2;  // with down_transposed
  const std::int64_t free = sysconf(_SC_AVPHYS_PAGES) * std::int64_t{sysconf(_SC_PAGESIZE)};
  const std::int64_t wanted = std::clamp(2 * cache_bytes() / read + 1, kMinCopies, kMaxCopies);
  return std::clamp<std::int64_t>(free / 3 / held, 1, wanted);
}

// The patterns of the copies: windows of the trace, spread evenly over it.
std::vector<Trace> windows(const Trace& trace, std::int64_t copies, std::int64_t distinct) {
  std::vector<Trace> result;
  const std::int64_t available = std::max<std::int64_t>(1, trace.tokens() / distinct);
  for (std::int64_t i = 0; i < copies; ++i) {
    const std::int64_t place = copies <= available ? i * available / copies : i % available;
    result.push_back(window(trace, place * distinct, distinct));
  }
  return result;
}

struct Achieved {
  double active = 0;
  double tile_union = 0;
};

// Over all copies. Batches of fewer than 128 tokens are tiles of their own.
Achieved measure(const std::vector<Trace>& patterns, std::int64_t batch) {
  Achieved mean;
  for (const Trace& pattern : patterns) {
    const std::int64_t tile = std::min({batch, kTile, pattern.tokens()});
    const std::int64_t tiles = pattern.tokens() / tile;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const TraceStatistics s = trace_statistics(window(pattern, i * tile, tile));
      mean.active += s.mean_active / static_cast<double>(tiles * patterns.size());
      mean.tile_union += s.mean_union(kTile) / static_cast<double>(tiles * patterns.size());
    }
  }
  return mean;
}

// Throws unless PyTorch's projection and twell's counts show exactly the pattern.
void check_pattern(const std::string& name, const PatternedFfn& ffn) {
  if (!ffn.pattern_matches()) {
    throw Error("case " + name + ": PyTorch's projection does not follow the pattern");
  }
  std::vector<std::int32_t> expected(ffn.neurons());
  const std::int64_t tokens = ffn.x.size(0);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (const auto neuron : ffn.pattern.row(token % ffn.pattern.tokens())) ++expected[neuron];
  }
  const Tensor activity = run_twell(ffn.x, ffn).activity.cpu();
  if (!activity.equal(torch::tensor(expected, torch::kInt32))) {
    throw Error("case " + name + ": twell's counts of active neurons do not follow the pattern");
  }
}

// Whether the planner would run the case dense.
bool planned_dense(const FfnBenchOptions& options, const Achieved& achieved) {
  if (options.path != FfnPath::kAuto) return options.path == FfnPath::kDense;
  using Signature = std::string(std::string, torch::ScalarType, std::int64_t, std::int64_t,
                                std::int64_t, std::string, bool, double, double, std::string);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("twell::ffn_plan", "").typed<Signature>();
  const std::string plan = op.call(name_of(options.kind), torch::kBFloat16, options.tokens,
                                   options.hidden, options.neurons, "auto", false, achieved.active,
                                   achieved.tile_union, options.device.str());
  return nlohmann::json::parse(plan).at("path") == "dense";
}

}  // namespace

nlohmann::ordered_json bench_ffn(const std::string& name, const Trace& pattern,
                                 const FfnBenchOptions& options) {
  const torch::InferenceMode inference;
  const std::int64_t distinct_limit = max_distinct_tokens(options.hidden);
  // Several small batches share a copy of the weights; a large one repeats its window.
  const std::int64_t batches = std::max<std::int64_t>(1, kTile / options.tokens);
  const std::int64_t rows = batches * options.tokens;
  const std::int64_t distinct = std::min(rows, distinct_limit);
  const std::int64_t copies = copy_count(options);
  const std::vector<Trace> patterns = windows(pattern, copies, distinct);
  const Achieved achieved = measure(patterns, options.tokens);
  const bool as_dense = planned_dense(options, achieved);

  const FfnTensors base = random_ffn(options.kind, options.hidden, options.neurons, options.seed);
  std::vector<PatternedFfn> ffns;
  for (std::int64_t i = 0; i < copies; ++i) {
    ffns.emplace_back(base, options.kind, patterns[i], rows, options.seed + 1 + i);
    ffns.back().to(options.device);
    check_pattern(name, ffns.back());
  }
  const auto batch = [&](const PatternedFfn& ffn, std::int64_t i) {
    return ffn.x.narrow(0, i % batches * options.tokens, options.tokens);
  };

  std::vector<Variant> variants;
  variants.push_back({"separate", run_separate});
  if (options.kind == FfnKind::kGated) variants.push_back({"concatenated", run_concatenated});
  variants.push_back({"twell", [as_dense](const Tensor& x, const PatternedFfn& ffn) {
                        return as_dense ? run_separate(x, ffn) : run_twell(x, ffn).y;
                      }});

  // One tile's worth of tokens, since the error of a single token is noise.
  const Tensor sample = ffns[0].x.narrow(0, 0, std::min(rows, kMaxErrorTokens));
  const Tensor exact = run_exact(sample, ffns[0]);
  const double dense_error = relative_error(run_separate(sample, ffns[0]), exact);
  const double twell_error = relative_error(variants.back().run(sample, ffns[0]), exact);
  if (!(twell_error <= 1.1 * dense_error)) {
    throw Error("case " + name + ": twell's error is " + std::to_string(twell_error) +
                ", more than 1.1 times PyTorch's " + std::to_string(dense_error));
  }

  const Timer timer(options.device, /*flush=*/true);
  const auto start = std::chrono::steady_clock::now();
  const auto count = static_cast<std::int64_t>(variants.size());
  std::int64_t rounds = -copies;  // the first turn of every copy warms up
  for (bool enough = false; !enough; ++rounds) {
    for (std::int64_t v = 0; v < count; ++v) {
      const PatternedFfn& ffn = ffns[(rounds + copies + v * copies / count) % copies];
      const Tensor x = batch(ffn, (rounds + copies) / copies);
      const double ms = timer([&] { variants[v].run(x, ffn); });
      if (rounds >= 0) variants[v].ms.push_back(ms);
    }
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    // Whole turns, so that every copy counts alike.
    enough = rounds + 1 > 0 && (rounds + 1) % copies == 0 && spent.count() >= options.seconds;
  }

  const Variant& twell = variants.back();
  const Variant& dense =
      *std::min_element(variants.begin(), variants.end() - 1,
                        [](auto& a, auto& b) { return a.quantile(0.5) < b.quantile(0.5); });
  nlohmann::ordered_json result = {{"case", name},
                                   {"ffn_kind", name_of(options.kind)},
                                   {"tokens", options.tokens},
                                   {"hidden", options.hidden},
                                   {"neurons", options.neurons},
                                   {"path", as_dense ? "dense" : "twell"},
                                   {"dense_ms", dense.quantile(0.5)},
                                   {"twell_ms", twell.quantile(0.5)},
                                   {"ratio", dense.quantile(0.5) / twell.quantile(0.5)},
                                   {"dense_form", dense.name}};
  for (const Variant& variant : variants) {
    result["spread_ms"][variant.name] = {{"p10", variant.quantile(0.1)},
                                         {"median", variant.quantile(0.5)},
                                         {"p90", variant.quantile(0.9)}};
  }
  result.update({{"active_mean", achieved.active},
                 {"union_mean", achieved.tile_union},
                 {"union_tokens", std::min(options.tokens, kTile)},
                 {"distinct_tokens", std::min<std::int64_t>(distinct * copies, pattern.tokens())},
                 {"pattern_verified", true},
                 {"twell_error", twell_error},
                 {"dense_error", dense_error},
                 {"rounds", rounds},
                 {"weight_copies", copies}});
  return result;
}

}  // namespace twell::app
