// The `twell` program: subcommands register themselves; every error ends here as one line.

#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "app/commands/bench.h"
#include "app/commands/compact.h"
#include "app/commands/eval.h"
#include "app/commands/generate.h"
#include "app/commands/inspect.h"
#include "app/commands/train.h"

namespace {

int fail(const std::string& message, int code) {
  std::cerr << "twell: " << message.substr(0, message.find('\n')) << '\n';
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Sparse feed-forward blocks for language models: train, evaluate and run them."};
  app.name("twell");
  app.require_subcommand(0, 1);
  app.set_version_flag("--version", TWELL_VERSION);
  twell::app::add_train_command(app);
  twell::app::add_eval_command(app);
  twell::app::add_generate_command(app);
  twell::app::add_bench_command(app);
  twell::app::add_inspect_command(app);
  twell::app::add_compact_command(app);
  try {
    app.parse(argc, argv);  // runs the subcommand's callback
    if (app.get_subcommands().empty()) {
      std::cerr << app.help();
      return 2;
    }
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    return fail(std::string(error.what()) + " (see twell --help)", 2);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
  return EXIT_SUCCESS;
}
