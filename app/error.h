#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace twell::app {

// What the program throws for anything the user can put right: one line that names the thing, its
// value and what is permitted. main() prints it and exits with a non-zero status.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// `text` in double quotes, fit for a one-line message whatever a hostile file put there: control
// characters and bytes that are not UTF-8 become \xHH, and what is over 80 bytes is cut.
std::string quote(std::string_view text);

}  // namespace twell::app
