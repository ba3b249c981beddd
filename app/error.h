#pragma once

#include <stdexcept>

namespace twell::app {

// What the program throws for anything the user can put right: one line that names the thing, its
// value and what is permitted. main() prints it and exits with a non-zero status.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace twell::app
