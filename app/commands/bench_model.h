#pragma once

#include <CLI/CLI.hpp>

namespace twell::app {

void add_bench_model_command(CLI::App& bench);

}  // namespace twell::app
