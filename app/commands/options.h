#pragma once
// Flags that several subcommands share.

#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <string>

#include "app/model/ffn.h"

namespace twell::app {

struct RunOptions {
  std::string device = "cpu";
  int threads = 0;  // 0: all that the process may use
  std::string ffn = "auto";
  std::string dtype = "bfloat16";
  bool json = false;

  // Adds --device, --threads and --json.
  void add_to(CLI::App& command);
  void add_ffn_to(CLI::App& command);    // --ffn
  void add_dtype_to(CLI::App& command);  // --dtype

  // Applies --threads and gives the device; Error if there is no such device here.
  torch::Device start() const;
  FfnMode ffn_mode() const { return parse_ffn_mode(ffn); }
  torch::ScalarType scalar_type() const;
};

}  // namespace twell::app
