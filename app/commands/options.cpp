#include "app/commands/options.h"

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <thread>

#include "app/error.h"

namespace twell::app {
namespace {

// The processors this process may use: a container's share, not the whole machine.
int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

void RunOptions::add_device_to(CLI::App& command) {
  command.add_option("--device", device, "cpu, cuda or cuda:N")->capture_default_str();
  command.add_option("--threads", threads, "CPU threads; 0: all that this process may use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
}

void RunOptions::add_to(CLI::App& command) {
  add_device_to(command);
  command.add_flag("--json", json, "Print the result as JSON on standard output");
}

void RunOptions::add_ffn_to(CLI::App& command) {
  command
      .add_option("--ffn", ffn,
                  "How feed-forward blocks run: dense, twell (sparse), or auto (the planner "
                  "decides per layer)")
      ->check(CLI::IsMember({"dense", "twell", "auto"}))
      ->capture_default_str();
}

void RunOptions::add_dtype_to(CLI::App& command) {
  command.add_option("--dtype", dtype, "Type to compute in: bfloat16 or float32")
      ->check(CLI::IsMember({"bfloat16", "float32"}))
      ->capture_default_str();
}

torch::Device RunOptions::start() const {
  at::set_num_threads(threads > 0 ? threads : available_processors());
  if (device == "cpu") return torch::kCPU;
  if (device != "cuda" && !device.starts_with("cuda:")) {
    throw Error("--device is '" + device + "'; permitted: cpu, cuda, cuda:N");
  }
  int ordinal = 0;
  if (device != "cuda") {
    const std::string digits = device.substr(5);
    if (digits.empty() || digits.size() > 3 ||
        digits.find_first_not_of("0123456789") != std::string::npos) {
      throw Error("--device is '" + device + "'; permitted: cpu, cuda, cuda:N");
    }
    ordinal = std::stoi(digits);
  }
  if (!torch::cuda::is_available() || static_cast<int>(torch::cuda::device_count()) <= ordinal) {
    throw Error("--device " + device +
                ": PyTorch finds no such CUDA device here; use --device cpu");
  }
  return torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(ordinal));
}

torch::ScalarType RunOptions::scalar_type() const {
  return dtype == "float32" ? torch::kFloat32 : torch::kBFloat16;
}

void TextRun::add_to(CLI::App& command) {
  command.add_option("--data", data, "UTF-8 text files, folders or .jsonl files")->required();
  command.add_option("--context", context, "Tokens of a window; 0: the model's, at most 2048")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  command.add_option("--batch", batch, "Windows at a time")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 16))
      ->capture_default_str();
  command.add_option("--max-tokens", max_tokens, "Stop after so many tokens; 0: never")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
}

TokenStream TextRun::read(const Tokenizer& tokenizer, const ModelConfig& config) const {
  const int64_t wanted = max_tokens > 0 ? max_tokens + 1 : 0;  // the first one is not scored
  return read_stream({data.begin(), data.end()}, tokenizer, config.separator(), config.vocab_size,
                     wanted);
}

EvaluationOptions TextRun::evaluation(const ModelConfig& config, FfnMode mode) const {
  EvaluationOptions options;
  options.ffn = mode;
  options.context = context > 0 ? context : std::min<int64_t>(config.max_position_embeddings, 2048);
  options.batch = batch;
  options.max_tokens = max_tokens;
  return options;
}

}  // namespace twell::app
