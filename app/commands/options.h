#pragma once
// Flags that several subcommands share.

#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "app/data/tokens.h"
#include "app/hf/config.h"
#include "app/hf/tokenizer.h"
#include "app/model/ffn.h"
#include "app/train/evaluate.h"

namespace twell::app {

struct RunOptions {
  std::string device = "cpu";
  int threads = 0;  // 0: all that the process may use
  std::string ffn = "auto";
  std::string dtype = "bfloat16";
  bool json = false;

  void add_device_to(CLI::App& command);  // --device and --threads
  void add_to(CLI::App& command);         // these and --json
  void add_ffn_to(CLI::App& command);     // --ffn
  void add_dtype_to(CLI::App& command);   // --dtype

  // Applies --threads and gives the device; Error if there is no such device here.
  torch::Device start() const;
  FfnMode ffn_mode() const { return parse_ffn_mode(ffn); }
  torch::ScalarType scalar_type() const;
};

// The text that a model is evaluated on, and how.
struct TextRun {
  std::vector<std::string> data;
  int64_t context = 0;  // 0: the model's, at most 2048
  int64_t batch = 16;
  int64_t max_tokens = 0;  // 0: all

  // Adds --data, --context, --batch and --max-tokens.
  void add_to(CLI::App& command);

  TokenStream read(const Tokenizer& tokenizer, const ModelConfig& config) const;
  EvaluationOptions evaluation(const ModelConfig& config, FfnMode mode) const;
};

}  // namespace twell::app
