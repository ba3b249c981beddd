#include "app/commands/bench.h"

#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "app/bench/ffn_bench.h"
#include "app/bench/machine.h"
#include "app/bench/patterned_ffn.h"
#include "app/commands/bench_model.h"
#include "app/commands/options.h"
#include "app/error.h"
#include "app/trace/trace.h"
#include "app/util/atomic_file.h"

namespace twell::app {
namespace {

constexpr std::int64_t kRandomTokens = 4096;  // of a random pattern, as many as in a trace

struct BenchFfnFlags {
  RunOptions run{.ffn = "twell"};
  std::string trace;
  std::optional<int> layer;
  std::optional<double> density;
  std::optional<std::int64_t> neurons;
  std::string kind = "gated";
  std::string json;
  FfnBenchOptions bench;
};

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%g%%", 100 * share);
  return text;
}

void print(const nlohmann::ordered_json& result) {
  char line[200];
  std::snprintf(line, sizeof line,
                "%s, %s, %lld tokens: dense %.3f ms, twell %.3f ms, ratio %.2f "
                "(%.1f neurons active, union %.0f)",
                result["case"].get<std::string>().c_str(),
                result["ffn_kind"].get<std::string>().c_str(),
                static_cast<long long>(result["tokens"]), double{result["dense_ms"]},
                double{result["twell_ms"]}, double{result["ratio"]}, double{result["active_mean"]},
                double{result["union_mean"]});
  std::cout << line << '\n';
}

void run_bench_ffn(const BenchFfnFlags& flags) {
  FfnBenchOptions options = flags.bench;
  options.device = flags.run.start();
  options.kind = flags.kind == "gated" ? FfnKind::kGated : FfnKind::kPlain;
  options.path = flags.run.ffn_mode() == FfnMode::kAuto ? FfnPath::kAuto : FfnPath::kSparse;

  std::string name;
  Trace pattern;
  if (!flags.trace.empty()) {
    if (flags.density) throw Error("--trace and --density exclude each other; give one");
    if (!flags.layer) throw Error("--trace needs --layer L");
    pattern = read_trace(flags.trace, *flags.layer);
    options.neurons = flags.neurons.value_or(pattern.neurons);
    if (options.neurons != pattern.neurons) {
      throw Error("--neurons is " + std::to_string(options.neurons) + ", but the trace has " +
                  std::to_string(pattern.neurons));
    }
    if (pattern.tokens() == 0) throw Error("trace folder " + flags.trace + ": has no tokens");
    name = "layer" + std::to_string(*flags.layer);
  } else {
    if (!flags.density) throw Error("give --trace DIR --layer L, or --density P (from 0 to 1)");
    options.neurons = flags.neurons.value_or(options.neurons);
    pattern = random_pattern(kRandomTokens, options.neurons, *flags.density, options.seed);
    name = "random" + percent(*flags.density);
  }

  const nlohmann::ordered_json result = bench_ffn(name, pattern, options);
  print(result);
  if (!flags.json.empty()) {
    const nlohmann::ordered_json report = {{"machine", describe_machine(options.device)},
                                           {"results", {result}}};
    write_file(flags.json, report.dump(1) + "\n");
  }
}

}  // namespace

void add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Time twell against PyTorch");
  bench->require_subcommand(1);
  CLI::App* ffn = bench->add_subcommand(
      "ffn",
      "Time one feed-forward block in bf16 against PyTorch's dense one, in this process, with "
      "the activation pattern of a trace or a random one");
  const auto flags = std::make_shared<BenchFfnFlags>();
  ffn->add_option("--trace", flags->trace, "Folder of activation traces")
      ->check(CLI::ExistingDirectory);
  ffn->add_option("--layer", flags->layer, "Layer of the trace");
  ffn->add_option("--density", flags->density,
                  "Instead of a trace: each neuron is active with this probability")
      ->check(CLI::Range(0.0, 1.0));
  ffn->add_option("--tokens", flags->bench.tokens, "Tokens per call")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  ffn->add_option("--hidden", flags->bench.hidden, "Hidden size K")
      ->check(CLI::Range(8, 1 << 16))
      ->capture_default_str();
  ffn->add_option("--neurons", flags->neurons, "Neurons N; as in the trace, or 5632")
      ->check(CLI::Range(8, 1 << 16));
  ffn->add_option("--ffn-kind", flags->kind, "gated or plain")
      ->check(CLI::IsMember({"gated", "plain"}))
      ->capture_default_str();
  ffn->add_option("--ffn", flags->run.ffn, "twell: force the sparse path; auto: as planned")
      ->check(CLI::IsMember({"twell", "auto"}))
      ->capture_default_str();
  flags->run.add_device_to(*ffn);
  ffn->add_option("--seconds", flags->bench.seconds, "Time to measure for, about")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  ffn->add_option("--seed", flags->bench.seed, "Of the weights and inputs")->capture_default_str();
  ffn->add_option("--json", flags->json, "Write the result and the machine to this file");
  ffn->callback([flags] { run_bench_ffn(*flags); });
  add_bench_model_command(*bench);
}

}  // namespace twell::app
