#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace twell::app {

// Bytes of the UTF-8 character that starts `text` (1 to 4), or 0 if there is none: empty, overlong,
// a surrogate, over U+10FFFF, cut short, or a stray byte (Unicode 16.0, table 3-7).
size_t utf8_length(std::string_view text);

// The code point of the character that starts `text`, which must be well-formed and not empty.
uint32_t utf8_code_point(std::string_view text);

// Offset of the first byte that is not part of well-formed UTF-8, if any.
std::optional<size_t> find_invalid_utf8(std::string_view text);

// `text` with every maximal ill-formed part replaced by U+FFFD (Unicode 16.0, section 3.9).
std::string repair_utf8(std::string text);

}  // namespace twell::app
