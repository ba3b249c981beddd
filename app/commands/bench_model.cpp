#include "app/commands/bench_model.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "app/bench/machine.h"
#include "app/bench/model_bench.h"
#include "app/bench/patterned_ffn.h"
#include "app/bench/patterned_model.h"
#include "app/commands/options.h"
#include "app/data/tokens.h"
#include "app/error.h"
#include "app/hf/tokenizer.h"
#include "app/trace/trace.h"
#include "app/util/atomic_file.h"
#include "app/util/memory.h"
#include "app/util/progress.h"

namespace twell::app {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::int64_t kBatches = 4;  // different ones, in turn

struct BenchModelFlags {
  RunOptions run;
  std::string checkpoint;
  std::vector<std::string> data;
  std::string trace;
  std::optional<double> density;
  // Of a made-up model.
  std::int64_t layers = 8;
  std::int64_t hidden = 2048;
  std::int64_t neurons = 5632;
  std::int64_t heads = 32;
  std::int64_t kv_heads = 32;
  std::int64_t vocabulary = 49152;

  std::vector<std::string> forms{"dense", "twell"};
  std::int64_t batch = 8;
  std::int64_t tokens = 2048;
  std::uint64_t seed = 1;
  std::string json;
  ModelBenchOptions bench;
};

struct Subject {
  Llama model;
  std::vector<torch::Tensor> batches;
  std::string source;
  bool pattern_verified = false;
};

bool trains(const BenchModelFlags& flags) { return flags.bench.work == ModelWork::kTrain; }

// A checkpoint on its own kind of text.
Subject read_subject(const BenchModelFlags& flags, const torch::Device& device) {
  if (flags.data.empty()) throw Error("--checkpoint needs --data PATH: the text to run through it");
  const auto stored = trains(flags) ? torch::kFloat32 : torch::kBFloat16;
  Subject subject{Llama::load(flags.checkpoint, stored, torch::kBFloat16, device), {}, {}};
  const ModelConfig& config = subject.model.config();
  const TokenStream stream =
      read_stream({flags.data.begin(), flags.data.end()}, Tokenizer::load(flags.checkpoint),
                  config.separator(), config.vocab_size, kBatches * flags.batch * flags.tokens + 1);
  const BatchSampler sampler(stream, flags.batch, flags.tokens, flags.seed);
  for (std::int64_t i = 0; i < kBatches; ++i) {
    subject.batches.push_back(sampler.batch(i).to(device));
  }
  subject.source = "checkpoint " + flags.checkpoint;
  return subject;
}

// A random model with the activity of a trace, or of a random pattern.
Subject make_subject(const BenchModelFlags& flags, const torch::Device& device) {
  ModelConfig config;
  config.hidden_size = flags.hidden;
  config.num_hidden_layers = flags.layers;
  config.num_attention_heads = flags.heads;
  config.num_key_value_heads = flags.kv_heads;
  config.head_dim = flags.hidden / flags.heads;
  config.vocab_size = flags.vocabulary;
  config.max_position_embeddings = flags.tokens;
  config.hidden_act = "relu";
  std::vector<Trace> traces;
  if (!flags.trace.empty()) {
    for (const int layer : trace_layers(flags.trace)) {
      traces.push_back(read_trace(flags.trace, layer));
    }
    std::vector<std::int64_t> neurons;  // the traces repeat as in patterned_model
    for (std::int64_t layer = 0; layer < flags.layers; ++layer) {
      neurons.push_back(traces[static_cast<std::size_t>(layer) % traces.size()].neurons);
    }
    config.intermediate_size = LayerWidths(neurons);
  } else {
    config.intermediate_size = flags.neurons;
  }
  std::int64_t distinct = std::min(max_distinct_tokens(flags.hidden), flags.vocabulary);
  for (const Trace& trace : traces) distinct = std::min(distinct, trace.tokens());
  std::vector<Trace> patterns;
  for (const Trace& trace : traces) patterns.push_back(window(trace, 0, distinct));
  for (std::int64_t layer = 0; traces.empty() && layer < flags.layers; ++layer) {
    patterns.push_back(
        random_pattern(distinct, flags.neurons, *flags.density, flags.seed + 1 + layer));
  }

  Subject subject{patterned_model(config, patterns, flags.seed, device), {}, {}, true};
  for (std::int64_t i = 0; i < kBatches; ++i) {
    subject.batches.push_back(
        patterned_tokens(distinct, flags.batch, flags.tokens + 1, i).to(device));
  }
  if (!trains(flags)) {
    for (auto& [name, value] : subject.model.parameters()) value = value.to(torch::kBFloat16);
  }
  if (!follows_patterns(subject.model, patterns, subject.batches.front())) {
    throw Error("PyTorch's projections do not follow the pattern");
  }
  subject.source =
      traces.empty() ? "random, density " + Json(*flags.density).dump() : "trace " + flags.trace;
  return subject;
}

void print(const Json& r, const std::vector<std::string>& forms) {
  std::printf("%s of %lld windows of %lld tokens, %lld layers, %.1f M parameters, %s\n",
              r["mode"].get<std::string>().c_str(), r["batch"].get<long long>(),
              r["tokens"].get<long long>(), r["layers"].get<long long>(),
              r["parameters"].get<double>() / 1e6, r["source"].get<std::string>().c_str());
  for (const std::string& form : forms) {
    std::printf("  %-5s %10.3f ms, %10.0f tokens/s, loss %.4f", form.c_str(),
                r[form + "_ms"].get<double>(), r["tokens_per_second"][form].get<double>(),
                r["loss"][form].get<double>());
    const Json& peak = r["peak_bytes"][form];
    if (!peak.is_null()) std::printf(", peak %.2f GB", peak.get<double>() / 1e9);
    const Json& energy = r["energy_mj_per_token"][form];
    if (!energy.is_null()) std::printf(", %.3f mJ/token", energy.get<double>());
    std::printf("\n");
  }
  std::printf("  %s / %s: %.2f\n", forms.front().c_str(), forms.back().c_str(),
              r["ratio"].get<double>());
}

// The kernels that take most of a step.
void print_kernels(const Json& kernels, const std::string& form) {
  constexpr std::size_t kMost = 15, kWidth = 80;
  std::printf("kernels of a step with %s blocks:\n", form.c_str());
  for (std::size_t i = 0; i < std::min(kMost, kernels.size()); ++i) {
    std::printf("  %8.3f ms %5lld x %s\n", kernels[i]["ms"].get<double>(),
                kernels[i]["calls"].get<long long>(),
                kernels[i]["name"].get<std::string>().substr(0, kWidth).c_str());
  }
}

void run_bench_model(const CLI::App& command, BenchModelFlags flags) {
  const int sources =
      int{!flags.checkpoint.empty()} + int{!flags.trace.empty()} + int{flags.density.has_value()};
  if (sources != 1) {
    throw Error(
        "random weights are not sparse: give one of --checkpoint DIR, --trace DIR and "
        "--density P");
  }
  const auto refuse = [&](const char* given, const std::vector<const char*>& names) {
    for (const char* name : names) {
      if (command.count(name) == 0) continue;
      throw Error(std::string(name) + " is not permitted with " + given + ", which has its own");
    }
  };
  if (!flags.checkpoint.empty()) {
    refuse("--checkpoint",
           {"--layers", "--hidden", "--neurons", "--heads", "--kv-heads", "--vocabulary"});
  } else if (!flags.data.empty()) {
    throw Error("--data goes with --checkpoint only");
  }
  if (!flags.trace.empty()) refuse("--trace", {"--neurons"});
  if (flags.hidden % (2 * flags.heads) != 0 || flags.heads % flags.kv_heads != 0) {
    throw Error("--hidden must be an even multiple of --heads, and that a multiple of --kv-heads");
  }
  const std::set<std::string> different(flags.forms.begin(), flags.forms.end());
  if (different.size() != flags.forms.size()) throw Error("--ffn names a form twice");

  const torch::Device device = flags.run.start();
  keep_freed_memory();
  if (flags.bench.kernels && device.is_cpu()) {
    throw Error("--kernels needs --device cuda: the kernels of a GPU are listed");
  }
  if (flags.bench.recompute && !trains(flags)) {
    throw Error("--checkpoint-activations goes with --mode train only");
  }
  flags.bench.forms.clear();
  for (const std::string& form : flags.forms) flags.bench.forms.push_back(parse_ffn_mode(form));
  Subject subject =
      flags.checkpoint.empty() ? make_subject(flags, device) : read_subject(flags, device);
  Json result = {{"case", "model"}, {"source", subject.source}};
  {
    Progress bar("bench");
    flags.bench.progress = [&](double done) { bar.update(done, ""); };
    result.update(bench_model(subject.model, subject.batches, flags.bench));
  }
  result["pattern_verified"] = subject.pattern_verified;
  print(result, flags.forms);
  for (const std::string& form : flags.forms) {
    if (flags.bench.kernels) print_kernels(result["kernels"][form], form);
  }
  if (!flags.json.empty()) {
    const Json report = {{"machine", describe_machine(device)}, {"results", {result}}};
    write_file(flags.json, report.dump(1) + "\n");
  }
}

}  // namespace

void add_bench_model_command(CLI::App& bench) {
  CLI::App& command = *bench.add_subcommand(
      "model",
      "Time a whole model, or its training step, with dense and with sparse blocks, everything "
      "else the same, in this process; the losses are compared");
  const auto flags = std::make_shared<BenchModelFlags>();
  const auto size = [&](const char* name, std::int64_t& value, const char* help) {
    command.add_option(name, value, help)
        ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 20))
        ->capture_default_str();
  };
  command.add_option("--checkpoint", flags->checkpoint,
                     "Hugging Face directory (Llama or Qwen2, ReLU) to time; needs --data");
  command.add_option("--data", flags->data, "Text for it: UTF-8 files, folders or .jsonl files");
  command
      .add_option("--trace", flags->trace,
                  "Instead: a random model whose layers follow these activation traces in turn")
      ->check(CLI::ExistingDirectory);
  command
      .add_option("--density", flags->density,
                  "Instead: a random model whose neurons are active with this probability")
      ->check(CLI::Range(0.0, 1.0));
  size("--layers", flags->layers, "Layers of a random model");
  size("--hidden", flags->hidden, "Its hidden size");
  size("--neurons", flags->neurons, "Its neurons per block; with --trace, as many as that has");
  size("--heads", flags->heads, "Its attention heads");
  size("--kv-heads", flags->kv_heads, "Its heads of keys and values");
  size("--vocabulary", flags->vocabulary, "Its vocabulary");
  static const std::map<std::string, ModelWork> kModes = {
      {"forward", ModelWork::kForward}, {"eval", ModelWork::kEval}, {"train", ModelWork::kTrain}};
  command
      .add_option("--mode", flags->bench.work,
                  "forward: all tokens, and the logits of each window's last, as for a prompt; "
                  "eval: and the loss of every token; train: and backward and AdamW")
      ->transform(CLI::CheckedTransformer(kModes).description("forward|eval|train"))
      ->default_str("forward");
  command.add_flag("--checkpoint-activations", flags->bench.recompute,
                   "Keep only each layer's input for backward and compute the layer again there");
  size("--batch", flags->batch, "Windows of a step");
  size("--tokens", flags->tokens, "Tokens of a window");
  command
      .add_option("--ffn", flags->forms, "Forms to compare; the ratio is the first's to the last's")
      ->delimiter(',')
      ->check(CLI::IsMember({"dense", "twell", "auto"}))
      ->capture_default_str();
  command.add_option("--seconds", flags->bench.seconds, "Time to measure for, about")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command.add_flag("--kernels", flags->bench.kernels,
                   "List the kernels of a step by time as well (--device cuda only)");
  command.add_option("--seed", flags->seed, "Of weights and windows")->capture_default_str();
  command.add_option("--json", flags->json,
                     "Write the result and the machine to this file; the commit is that of the "
                     "environment's TWELL_COMMIT");
  flags->run.add_device_to(command);
  command.footer(
      "Examples:\n"
      "  twell bench model --density 0.01 --layers 2 --hidden 512 --neurons 2048 --heads 8 "
      "--kv-heads 8\n"
      "  twell bench model --checkpoint runs/a --data text.jsonl --mode train --json model.json\n"
      "  twell bench model --trace traces --device cuda --batch 8 --tokens 2048\n");
  command.callback([flags, &command] { run_bench_model(command, *flags); });
}

}  // namespace twell::app
