#include "app/commands/inspect.h"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "app/commands/options.h"
#include "app/data/tokens.h"
#include "app/error.h"
#include "app/hf/tokenizer.h"
#include "app/inspect/observe.h"
#include "app/inspect/report.h"
#include "app/model/llama.h"
#include "app/trace/trace.h"
#include "app/util/atomic_file.h"
#include "app/util/progress.h"

namespace twell::app {
namespace {

struct InspectFlags {
  RunOptions run;
  std::string model;
  std::vector<std::string> data;
  std::string trace;
  std::string save_trace;
  std::string html;
  ObserveOptions observe;
  InspectTarget target;
};

std::vector<Trace> observe_model(InspectFlags& flags) {
  const auto type = flags.run.scalar_type();
  Llama model = Llama::load(flags.model, type, type, flags.target.device);
  const ModelConfig& config = model.config();
  flags.target.hidden = config.hidden_size;
  flags.observe.context =
      std::min<std::int64_t>(flags.observe.context, config.max_position_embeddings);
  const Tokenizer tokenizer = Tokenizer::load(flags.model);
  const TokenStream stream =
      read_stream({flags.data.begin(), flags.data.end()}, tokenizer, config.separator(),
                  config.vocab_size, flags.observe.max_tokens);
  Progress bar("inspect");
  flags.observe.progress = [&](double done) { bar.update(done, ""); };
  return observe(model, stream, flags.observe);
}

void run_inspect(InspectFlags flags) {
  flags.target.device = flags.run.start();
  if (flags.model.empty() == flags.trace.empty()) {
    throw Error("give either --model DIR with --data PATH, or --trace DIR");
  }
  std::vector<Trace> traces;
  if (!flags.model.empty()) {
    if (flags.data.empty()) throw Error("--model needs --data PATH: the text to run through it");
    traces = observe_model(flags);
  } else {
    for (const int layer : trace_layers(flags.trace)) {
      traces.push_back(read_trace(flags.trace, layer));
    }
  }
  const std::string source = flags.model.empty() ? flags.trace : flags.model;
  if (!flags.save_trace.empty()) {
    const auto folder = std::filesystem::absolute(source).lexically_normal();
    const auto name = folder.has_filename() ? folder.filename() : folder.parent_path().filename();
    write_traces(flags.save_trace, name.string(), traces);
  }
  const nlohmann::ordered_json report = inspect_report(source, traces, flags.target);
  if (!flags.html.empty()) write_file(flags.html, draw_html(report));
  std::cout << (flags.run.json ? report.dump(2) + "\n" : draw_text(report)) << std::flush;
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  const auto flags = std::make_shared<InspectFlags>();
  CLI::App& command = *app.add_subcommand(
      "inspect", "Show where a model is sparse, and what the planner expects of it");
  command.add_option("--model", flags->model, "Hugging Face directory (Llama or Qwen2, ReLU)");
  command.add_option("--data", flags->data, "Text to run through it: files, folders or .jsonl");
  command.add_option("--trace", flags->trace, "Instead: a folder of activation traces");
  command.add_option("--save-trace", flags->save_trace, "Write the traces to this folder");
  command.add_option("--html", flags->html, "Write a page with pictures to this file");
  command.add_option("--max-tokens", flags->observe.max_tokens, "Tokens to look at")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24))
      ->capture_default_str();
  command
      .add_option("--context", flags->observe.context, "Tokens of a window, at most the model's")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 20))
      ->capture_default_str();
  command
      .add_option("--hidden", flags->target.hidden,
                  "With --trace: the hidden size that the speed-up is predicted for")
      ->check(CLI::Range(8, 1 << 16))
      ->capture_default_str();
  flags->run.add_dtype_to(command);
  flags->run.add_to(command);
  command.footer(
      "Examples:\n"
      "  twell inspect --model runs/a --data /usr/include/c++\n"
      "  twell inspect --model runs/a --data text.jsonl --save-trace traces --html sparse.html\n"
      "  twell inspect --trace traces --json\n");
  command.callback([flags] { run_inspect(*flags); });
}

}  // namespace twell::app
