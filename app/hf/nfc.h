#pragma once

#include <string>
#include <string_view>

namespace twell::app {

// Unicode's normalization form C of UTF-8 `text`, as the normalizer NFC of `tokenizers` computes
// it: with the tables of Unicode 9, so that marks which later versions added keep their place and
// compose with nothing.
std::string to_nfc(std::string_view text);

}  // namespace twell::app
