#include "app/commands/compact.h"

#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/commands/options.h"
#include "app/compact/compact.h"
#include "app/error.h"
#include "app/hf/tokenizer.h"
#include "app/model/llama.h"
#include "app/train/evaluate.h"
#include "app/util/memory.h"
#include "app/util/progress.h"

namespace twell::app {
namespace {

using Json = nlohmann::ordered_json;

struct CompactFlags {
  // The planner might choose one form before and another after, whose roundings differ.
  RunOptions run{.ffn = "dense"};
  TextRun text;
  std::string model;
  std::string out;
  int64_t multiple = 64;
  bool one_width = false;
};

struct Measured {
  Evaluation evaluation;
  int64_t parameters = 0;
  CheckpointBytes bytes;
};

Measured measure(const CompactFlags& flags, const std::string& folder, const char* title,
                 const torch::Device& device) {
  const auto type = flags.run.scalar_type();
  Llama model = Llama::load(folder, type, type, device);
  if (!model.is_relu()) {
    throw Error(folder + " has hidden_act \"" + model.config().hidden_act +
                "\", whose neurons are never silent; permitted: \"relu\"");
  }
  const TokenStream stream = flags.text.read(Tokenizer::load(folder), model.config());
  EvaluationOptions options = flags.text.evaluation(model.config(), flags.run.ffn_mode());
  Progress bar(title);
  options.progress = [&](double done) { bar.update(done, ""); };
  return {evaluate(model, stream, options), model.parameter_count(), checkpoint_bytes(folder)};
}

void print(const CompactFlags& flags, const Json& r) {
  const auto number = [](const Json& of, const char* key) { return of[key].get<double>(); };
  const auto integer = [](const Json& of, const char* key) { return of[key].get<long long>(); };
  std::printf("layer    fired     kept       of      FFN, MB   before\n");
  for (const Json& layer : r["layers"]) {
    std::printf("%5lld %8lld %8lld %8lld %12.2f %8.2f\n", integer(layer, "layer"),
                integer(layer, "fired"), integer(layer, "neurons_after"),
                integer(layer, "neurons_before"), number(layer, "bytes_after") / 1e6,
                number(layer, "bytes_before") / 1e6);
  }
  std::printf(
      "%s: %lld of %lld neurons\n"
      "parameters %.3f M instead of %.3f M, weights %.2f MB instead of %.2f MB (%+.1f%%)\n"
      "perplexity %.4f, before %.4f, on %lld tokens\n%s\n",
      flags.out.c_str(), integer(r, "neurons_after"), integer(r, "neurons_before"),
      number(r, "parameters_after") / 1e6, number(r, "parameters_before") / 1e6,
      number(r, "bytes_after") / 1e6, number(r, "bytes_before") / 1e6,
      100 * (number(r, "bytes_after") / number(r, "bytes_before") - 1),
      number(r, "perplexity_after"), number(r, "perplexity_before"), integer(r, "tokens"),
      r["one_width"].get<bool>()
          ? "all layers have one width: transformers loads it"
          : "layers differ in width: only twell loads it (transformers needs --one-width)");
}

void run_compact(const CompactFlags& flags) {
  const torch::Device device = flags.run.start();
  check_output_folder(flags.out);  // before the work, not after it
  keep_freed_memory();
  const Measured before = measure(flags, flags.model, "counting", device);
  std::vector<torch::Tensor> activity;
  for (const LayerActivity& layer : before.evaluation.layers) activity.push_back(layer.counts);
  const Compaction compaction = plan_compaction(activity, flags.multiple, flags.one_width);
  write_compacted(flags.model, flags.out, compaction);
  const Measured after = measure(flags, flags.out, "checking", device);

  Json layers = Json::array();
  int64_t neurons_before = 0, neurons_after = 0;
  for (size_t i = 0; i < activity.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    const int64_t neurons = activity[i].size(0), width = compaction.widths[layer];
    neurons_before += neurons;
    neurons_after += width;
    layers.push_back({{"layer", layer},
                      {"fired", compaction.fired[i]},
                      {"neurons_before", neurons},
                      {"neurons_after", width},
                      {"bytes_before", before.bytes.ffn.at(layer)},
                      {"bytes_after", after.bytes.ffn.at(layer)}});
  }
  const Json report = {{"model", flags.model},
                       {"out", flags.out},
                       {"ffn", flags.run.ffn},
                       {"dtype", flags.run.dtype},
                       {"tokens", before.evaluation.tokens},
                       {"layers", layers},
                       {"one_width", compaction.widths.all_equal()},
                       {"neurons_before", neurons_before},
                       {"neurons_after", neurons_after},
                       {"parameters_before", before.parameters},
                       {"parameters_after", after.parameters},
                       {"bytes_before", before.bytes.all},
                       {"bytes_after", after.bytes.all},
                       {"loss_before", before.evaluation.loss},
                       {"loss_after", after.evaluation.loss},
                       {"loss_unit", "nats per token"},
                       {"perplexity_before", before.evaluation.perplexity()},
                       {"perplexity_after", after.evaluation.perplexity()}};
  if (flags.run.json) {
    std::cout << report.dump(2) << std::endl;
  } else {
    print(flags, report);
  }
}

}  // namespace

void add_compact_command(CLI::App& app) {
  auto flags = std::make_shared<CompactFlags>();
  CLI::App& command = *app.add_subcommand(
      "compact",
      "Remove the neurons that never fire on a text: a smaller checkpoint, the same outputs on "
      "that text");
  command.add_option("model", flags->model, "Hugging Face directory (Llama or Qwen2, ReLU)")
      ->required();
  command.add_option("--out", flags->out, "Folder for the smaller one; must be new or empty")
      ->required();
  command
      .add_option("--multiple", flags->multiple,
                  "Round widths up to a multiple of this, itself a multiple of 8; dense products "
                  "of GPUs are slow at widths that are not multiples of 64")
      ->check(CLI::Range(int64_t{8}, int64_t{65536}))
      ->check([](const std::string& text) {
        return std::stoll(text) % 8 == 0 ? "" : "--multiple is " + text + ": not a multiple of 8";
      })
      ->capture_default_str();
  command.add_flag("--one-width", flags->one_width,
                   "Give all layers the width of the widest, as transformers wants; without this, "
                   "each gets its own");
  flags->text.add_to(command);
  flags->run.add_ffn_to(command);
  flags->run.add_dtype_to(command);
  flags->run.add_to(command);
  command.footer(
      "Where layers differ in width, the checkpoint is twell's own: this program and the Python "
      "package (twell.from_pretrained) load it, transformers alone refuses it.\n"
      "A neuron that is silent on this text may fire on another: give text of every kind that the "
      "model will see, and as much as there is.\n"
      "Examples:\n"
      "  twell compact runs/a --data /usr/include/c++ --out runs/a-compact\n"
      "  twell compact runs/a --data text.jsonl --max-tokens 1000000 --one-width --out small\n");
  command.callback([flags] { run_compact(*flags); });
}

}  // namespace twell::app
