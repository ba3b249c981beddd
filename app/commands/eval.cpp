#include "app/commands/eval.h"

#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/commands/options.h"
#include "app/data/tokens.h"
#include "app/error.h"
#include "app/hf/safetensors.h"
#include "app/hf/tokenizer.h"
#include "app/model/llama.h"
#include "app/train/evaluate.h"
#include "app/util/memory.h"
#include "app/util/progress.h"

namespace twell::app {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct EvalFlags {
  RunOptions run;
  TextRun text;
  std::string model;
  std::string logits;
};

// The first window's tokens and logits, to compare with other programs.
void save_logits(Llama& model, const TokenStream& stream, int64_t context, FfnMode mode,
                 const fs::path& path) {
  const torch::InferenceMode inference;
  const int64_t length = std::min(context, stream.size());
  torch::Tensor tokens = torch::empty({1, length}, torch::kInt64);
  for (int64_t i = 0; i < length; ++i) tokens[0][i] = stream[i];
  ForwardOptions options;
  options.ffn = mode;
  const torch::Tensor logits = model.logits(model.forward(tokens.to(model.device()), options));
  write_safetensors(path, {{"tokens", tokens[0]}, {"logits", logits[0].to(torch::kFloat32)}});
}

void run_eval(const EvalFlags& flags) {
  const torch::Device device = flags.run.start();
  keep_freed_memory();
  const auto type = flags.run.scalar_type();
  Llama model = Llama::load(flags.model, type, type, device);
  const ModelConfig& config = model.config();
  const FfnMode mode = flags.run.ffn_mode();
  model.check_mode(mode);
  const Tokenizer tokenizer = Tokenizer::load(flags.model);
  const TokenStream stream = flags.text.read(tokenizer, config);

  EvaluationOptions options = flags.text.evaluation(config, mode);
  Progress bar("eval");
  options.progress = [&](double done) { bar.update(done, ""); };
  const Evaluation result = evaluate(model, stream, options);
  if (!flags.logits.empty()) save_logits(model, stream, options.context, mode, flags.logits);

  Json active = Json::array(), silent = Json::array(), paths = Json::array();
  for (const LayerActivity& layer : result.layers) {
    active.push_back(layer.active);
    silent.push_back(layer.silent);
  }
  for (const FfnPath path : result.paths) paths.push_back(name_of(path));
  const Json neurons = config.intermediate_size;
  const double share = result.active() / config.intermediate_size.mean();
  const double rate = static_cast<double>(result.tokens) / result.seconds;
  if (flags.run.json) {
    const bool relu = model.is_relu();
    const Json report = {{"model", flags.model},
                         {"ffn", name_of(mode)},
                         {"dtype", flags.run.dtype},
                         {"context", options.context},
                         {"tokens", result.tokens},
                         {"loss", result.loss},
                         {"loss_unit", "nats per token"},
                         {"perplexity", result.perplexity()},
                         {"neurons", neurons},
                         {"active", relu ? Json(result.active()) : Json()},
                         {"active_share", relu ? Json(share) : Json()},
                         {"active_per_layer", active},
                         {"silent_per_layer", silent},
                         {"ffn_per_layer", paths},
                         {"seconds", result.seconds},
                         {"tokens_per_second", rate}};
    std::cout << report.dump(2) << std::endl;
    return;
  }
  std::printf("%s, ffn %s: perplexity %.4f, %.4f nats/token, %lld tokens, %.0f tokens/s\n",
              flags.model.c_str(), name_of(mode), result.perplexity(), result.loss,
              static_cast<long long>(result.tokens), rate);
  if (model.is_relu()) {
    std::printf("active neurons per token %.1f of %s (%.2f%%)\n", result.active(),
                neurons.dump().c_str(), 100 * share);
  }
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App& command = *app.add_subcommand("eval", "Perplexity of a model on text");
  command.add_option("--model", flags->model, "Hugging Face directory (Llama or Qwen2)")
      ->required();
  flags->text.add_to(command);
  command.add_option("--save-logits", flags->logits,
                     "Write the first window's tokens and logits [tokens, vocab] float32 to this "
                     "safetensors file");
  flags->run.add_ffn_to(command);
  flags->run.add_dtype_to(command);
  flags->run.add_to(command);
  command.footer(
      "Examples:\n"
      "  twell eval --model runs/a --data /usr/include/c++ --ffn twell\n"
      "  twell eval --model runs/a --data text.jsonl --ffn dense --json\n");
  command.callback([flags] { run_eval(*flags); });
}

}  // namespace twell::app
