#pragma once

#include <CLI/CLI.hpp>

namespace twell::app {

void add_compact_command(CLI::App& app);

}  // namespace twell::app
