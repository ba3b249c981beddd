#include "app/commands/train.h"

#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "app/commands/options.h"
#include "app/error.h"
#include "app/train/trainer.h"
#include "app/util/memory.h"

namespace twell::app {
namespace {

namespace fs = std::filesystem;

struct TrainFlags {
  RunOptions run;
  TrainOptions options;
  std::string out;
  bool resume = false;
};

void print_summary(const nlohmann::ordered_json& s) {
  std::printf(
      "%s: %.1f M parameters, %lld steps, %.1f M tokens, %.0f s\n"
      "held-out loss %.4f nats/token (perplexity %.2f); unigram baseline %.4f\n"
      "active neurons per token %.1f of %s (%.2f%%)\n",
      s["model"].get<std::string>().c_str(), s["parameters"].get<double>() / 1e6,
      s["steps"].get<long long>(), s["tokens"].get<double>() / 1e6,
      s["train_seconds"].get<double>(), s["heldout_loss"].get<double>(),
      s["heldout_perplexity"].get<double>(), s["unigram_loss"].get<double>(),
      s["active"].get<double>(), s["neurons"].dump().c_str(),
      100 * s["active_share"].get<double>());
}

void run_train(const CLI::App& command, TrainFlags flags) {
  TrainRun run;
  run.device = flags.run.start();
  run.folder = flags.out;
  run.resume = flags.resume;
  if (flags.resume) {
    for (const CLI::Option* option : command.get_options()) {
      const std::string name = option->get_name();
      const bool allowed = name == "--resume" || name == "--out" || name == "--json" ||
                           name == "--threads" || name == "--device";
      if (option->count() > 0 && !allowed) {
        throw CLI::ValidationError(name,
                                   "not permitted with --resume, which takes it from the "
                                   "checkpoint (permitted: --out, --threads, --device, "
                                   "--json)");
      }
    }
  } else {
    if (flags.options.data.empty()) throw CLI::RequiredError("--data");
    if (flags.options.tokenizer.empty()) {
      if (flags.options.init.empty()) throw CLI::RequiredError("--tokenizer (or --init)");
      flags.options.tokenizer = flags.options.init;
    }
    for (std::string& path : flags.options.data) path = fs::absolute(path).string();
    run.options = flags.options;
  }
  keep_freed_memory();
  const nlohmann::ordered_json summary = train(run);
  if (flags.run.json) {
    std::cout << summary.dump(2) << std::endl;
  } else {
    print_summary(summary);
  }
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto flags = std::make_shared<TrainFlags>();
  TrainOptions& o = flags->options;
  CLI::App& command = *app.add_subcommand("train", "Train a sparse language model on text");
  const auto add = [&command](const char* name, auto& value, const char* help) {
    return command.add_option(name, value, help);
  };
  command.add_option("--data", o.data, "UTF-8 text files, folders (recursive) or .jsonl files");
  command.add_option("--out", flags->out, "Folder for the model, metrics.jsonl and checkpoints")
      ->required();
  command.add_flag("--resume", flags->resume,
                   "Go on from the checkpoint in --out, to the same bits");
  add("--tokenizer", o.tokenizer, "tokenizer.json, or a folder that holds one");
  add("--eos", o.eos, "The token that ends a document; found by its usual names if not given");
  add("--init", o.init, "Start from this Hugging Face directory (Llama or Qwen2, ReLU)");
  add("--heldout", o.heldout, "Share of the documents held out")->capture_default_str();

  const auto group = [&](const char* name, std::vector<CLI::Option*> options) {
    for (CLI::Option* option : options) option->group(name)->capture_default_str();
  };
  group("Model", {add("--layers", o.layers, "Layers"), add("--hidden", o.hidden, "Hidden size"),
                  add("--neurons", o.neurons, "Neurons of a feed-forward block"),
                  add("--heads", o.heads, "Attention heads"),
                  add("--kv-heads", o.kv_heads, "Heads of keys and values"),
                  add("--context", o.context, "Tokens of a window")});
  group("Schedule",
        {add("--steps", o.steps, "Steps (0: see --max-seconds)"),
         add("--max-seconds", o.max_seconds,
             "Stop after this time, reading of the data included; without --steps the schedules "
             "follow it (0: no limit)"),
         add("--batch", o.batch, "Windows of a batch"),
         add("--accumulate", o.accumulate,
             "Batches of a step, one after the other: the gradient of a batch so many times as "
             "large, in the memory of one"),
         command.add_flag("--checkpoint-activations", o.checkpoint_activations,
                          "Keep only each layer's input for backward and compute the layer again "
                          "there: the same bits, less memory, more time"),
         add("--lr", o.lr, "Peak learning rate"),
         add("--lr-floor", o.lr_floor, "Learning rate at the end, as a share of the peak"),
         add("--warmup", o.warmup, "Warm-up of learning rate and lambda, as a share of the run"),
         add("--weight-decay", o.weight_decay, "Decoupled weight decay of the matrices"),
         add("--clip", o.clip, "Greatest norm of the gradient (0: any)"),
         add("--seed", o.seed, "Seed of weights and data order"),
         command.add_flag("--deterministic,!--no-deterministic", o.deterministic,
                          "The same bits in every run, also on a GPU, where attention's backward "
                          "is then slower")});
  group(
      "Sparsity",
      {add("--target-active", o.target_active,
           "Active neurons per token to steer to: a number, or a share such as 4% (0: keep "
           "lambda fixed)"),
       add("--lambda", o.lambda, "Coefficient of the L1 term after its warm-up"),
       add("--arrival", o.arrival, "When the target is reached, as a share of the run"),
       add("--revive-after", o.revive_after,
           "Draw the gate row of a neuron anew that has not fired for so many steps (0: never)")});
  group("Records", {add("--log-every", o.log_every, "Steps between lines of metrics"),
                    add("--eval-every", o.eval_every, "Steps between held-out evaluations"),
                    add("--eval-tokens", o.eval_tokens, "Tokens of such an evaluation"),
                    add("--checkpoint-every", o.checkpoint_every, "Steps between checkpoints")});
  command.add_option("--ffn", o.ffn, "How feed-forward blocks run: dense, twell or auto")
      ->check(CLI::IsMember({"dense", "twell", "auto"}))
      ->capture_default_str();
  flags->run.add_to(command);
  command.footer(
      "Examples:\n"
      "  twell train --data /usr/include/c++ --tokenizer tokenizer.json --out runs/a "
      "--max-seconds 240\n"
      "  twell train --data text.jsonl --tokenizer tokenizer.json --out runs/b --steps 1000 "
      "--target-active 64\n"
      "  twell train --resume --out runs/b\n");
  command.callback([flags, &command] { run_train(command, *flags); });
}

}  // namespace twell::app
