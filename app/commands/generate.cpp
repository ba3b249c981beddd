#include "app/commands/generate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/commands/options.h"
#include "app/error.h"
#include "app/hf/tokenizer.h"
#include "app/model/decoder.h"
#include "app/model/llama.h"
#include "app/model/sample.h"

namespace twell::app {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

struct GenerateFlags {
  RunOptions run;
  SampleOptions sample;
  std::string model;
  std::string prompt;
  int64_t max_tokens = 128;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The bytes of `text` up to a character that the next token may still complete: tokenizers decode
// the bytes of an unfinished one as U+FFFD.
size_t settled_bytes(const std::string& text) {
  static const std::string kReplacement = "\xef\xbf\xbd";
  size_t end = text.size();
  while (end >= kReplacement.size() && text.compare(end - 3, 3, kReplacement) == 0) end -= 3;
  return end;
}

void run_generate(const GenerateFlags& flags) {
  const torch::Device device = flags.run.start();
  const torch::InferenceMode inference;
  const auto type = flags.run.scalar_type();
  Llama model = Llama::load(flags.model, type, type, device);
  const ModelConfig& config = model.config();
  const Tokenizer tokenizer = Tokenizer::load(flags.model);
  std::vector<int64_t> prompt = tokenizer.encode(flags.prompt);
  if (prompt.empty()) {
    if (!config.bos_token_id) throw Error("--prompt is empty, and the model has no bos token");
    prompt.push_back(*config.bos_token_id);
  }
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  const int64_t limit = config.max_position_embeddings;
  if (prompt_tokens >= limit) {
    throw Error("--prompt has " + std::to_string(prompt_tokens) + " tokens; the model takes " +
                std::to_string(limit) + ", the generated ones included");
  }
  const int64_t wanted = std::min(flags.max_tokens, limit - prompt_tokens);

  const FfnMode ffn = flags.run.ffn_mode();
  Decoder decoder(model, ffn, prompt_tokens + wanted);
  Sampler sampler(flags.sample);
  auto start = Clock::now();
  torch::Tensor logits = decoder.prefill(torch::tensor(prompt, torch::kInt64));
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
  const double prefill_seconds = seconds_since(start);
  start = Clock::now();

  std::vector<int64_t> ids;
  std::string text;
  size_t shown = 0;
  const auto show = [&](size_t end) {
    if (end <= shown || flags.run.json) return;
    std::cout << text.substr(shown, end - shown) << std::flush;
    shown = end;
  };
  bool ended = false;
  int64_t decoded = 0;  // tokens that went through the model one by one
  if (!flags.run.json) std::cout << flags.prompt << std::flush;
  while (static_cast<int64_t>(ids.size()) < wanted) {
    const int64_t id = sampler.draw(logits);
    if (std::ranges::find(config.eos_token_ids, id) != config.eos_token_ids.end()) {
      ended = true;
      break;
    }
    ids.push_back(id);
    text = tokenizer.decode(ids);
    show(settled_bytes(text));
    if (static_cast<int64_t>(ids.size()) == wanted) break;
    logits = decoder.step(id);
    ++decoded;
  }
  show(text.size());
  const double decode_seconds = seconds_since(start);

  const double prefill_rate = static_cast<double>(prompt_tokens) / prefill_seconds;
  const double decode_rate = decoded > 0 ? static_cast<double>(decoded) / decode_seconds : 0;
  if (flags.run.json) {
    const Json report = {{"model", flags.model},
                         {"ffn", name_of(ffn)},
                         {"prompt", flags.prompt},
                         {"text", text},
                         {"prompt_tokens", prompt_tokens},
                         {"tokens", ids.size()},
                         {"ids", ids},
                         {"stopped", ended                       ? "eos"
                                     : wanted < flags.max_tokens ? "context full"
                                                                 : "max-tokens"},
                         {"prefill_tokens_per_second", prefill_rate},
                         {"decode_tokens_per_second", decode_rate}};
    std::cout << report.dump(2, ' ', false, Json::error_handler_t::replace) << std::endl;
    return;
  }
  std::cout << std::endl;
  std::fprintf(stderr, "prefill %lld tokens, %.1f tokens/s; decode %zu tokens, %.1f tokens/s\n",
               static_cast<long long>(prompt_tokens), prefill_rate, ids.size(), decode_rate);
}

}  // namespace

void add_generate_command(CLI::App& app) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App& command = *app.add_subcommand("generate", "Continue a text");
  command.add_option("--model", flags->model, "Hugging Face directory (Llama or Qwen2)")
      ->required();
  command.add_option("--prompt", flags->prompt, "The text to continue")->required();
  command.add_option("--max-tokens", flags->max_tokens, "Tokens to generate at most")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command.add_option("--temperature", flags->sample.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command.add_option("--top-k", flags->sample.top_k, "Draw from the k likeliest; 0: from all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30))
      ->capture_default_str();
  command
      .add_option("--top-p", flags->sample.top_p,
                  "Draw from the likeliest that together reach this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--seed", flags->sample.seed, "Seed of the drawing")->capture_default_str();
  flags->run.add_ffn_to(command);
  flags->run.add_dtype_to(command);
  flags->run.add_to(command);
  command.footer(
      "Examples:\n"
      "  twell generate --model runs/a --prompt \"template <class T>\" --max-tokens 100\n"
      "  twell generate --model runs/a --prompt \"#include\" --temperature 0 --ffn twell --json\n");
  command.callback([flags] { run_generate(*flags); });
}

}  // namespace twell::app
