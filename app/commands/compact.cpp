#include "app/commands/compact.h"

#include <algorithm>
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
};

struct Measured {
  Evaluation evaluation;
  int64_t parameters = 0;
  int64_t bytes = 0;
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
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  const auto integer = [&](const char* key) { return r[key].get<long long>(); };
  const auto [least, most] =
      std::minmax_element(r["kept_per_layer"].begin(), r["kept_per_layer"].end());
  std::printf(
      "%s: %lld of %lld neurons per layer (layers needed %lld to %lld)\n"
      "parameters %.3f M instead of %.3f M, weights %.2f MB instead of %.2f MB (%.1f%% less)\n"
      "perplexity %.4f, before %.4f, on %lld tokens\n",
      flags.out.c_str(), integer("neurons_after"), integer("neurons_before"),
      least->get<long long>(), most->get<long long>(), number("parameters_after") / 1e6,
      number("parameters_before") / 1e6, number("bytes_after") / 1e6, number("bytes_before") / 1e6,
      100 * (1 - number("bytes_after") / number("bytes_before")), number("perplexity_after"),
      number("perplexity_before"), integer("tokens"));
}

void run_compact(const CompactFlags& flags) {
  const torch::Device device = flags.run.start();
  check_output_folder(flags.out);  // before the work, not after it
  keep_freed_memory();
  const Measured before = measure(flags, flags.model, "counting", device);
  std::vector<torch::Tensor> activity;
  for (const LayerActivity& layer : before.evaluation.layers) activity.push_back(layer.counts);
  const Compaction compaction = plan_compaction(activity, flags.multiple);
  write_compacted(flags.model, flags.out, compaction);
  const Measured after = measure(flags, flags.out, "checking", device);

  Json kept = Json::array();
  for (const torch::Tensor& neurons : compaction.kept) kept.push_back(neurons.size(0));
  const Json report = {{"model", flags.model},
                       {"out", flags.out},
                       {"ffn", flags.run.ffn},
                       {"dtype", flags.run.dtype},
                       {"tokens", before.evaluation.tokens},
                       {"neurons_before", activity.front().size(0)},
                       {"neurons_after", compaction.width},
                       {"kept_per_layer", kept},
                       {"parameters_before", before.parameters},
                       {"parameters_after", after.parameters},
                       {"bytes_before", before.bytes},
                       {"bytes_after", after.bytes},
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
      .add_option(
          "--multiple", flags->multiple,
          "Round the width up to a multiple of this, itself a multiple of 8; dense products "
          "of GPUs are slow at widths that are not multiples of 64")
      ->check(CLI::Range(int64_t{8}, int64_t{65536}))
      ->check([](const std::string& text) {
        return std::stoll(text) % 8 == 0 ? "" : "--multiple is " + text + ": not a multiple of 8";
      })
      ->capture_default_str();
  flags->text.add_to(command);
  flags->run.add_ffn_to(command);
  flags->run.add_dtype_to(command);
  flags->run.add_to(command);
  command.footer(
      "A neuron that is silent on this text may fire on another: give text of every kind that the "
      "model will see, and as much as there is.\n"
      "Examples:\n"
      "  twell compact runs/a --data /usr/include/c++ --out runs/a-compact\n"
      "  twell compact runs/a --data text.jsonl --max-tokens 1000000 --out small --json\n");
  command.callback([flags] { run_compact(*flags); });
}

}  // namespace twell::app
