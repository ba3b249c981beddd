#include "app/util/utf8.h"

#include <cstring>

namespace twell::app {
namespace {

struct Prefix {
  size_t length;  // bytes of the longest prefix of a well-formed character, at least 1
  bool whole;     // it is a character
};

// `text` is not empty.
Prefix scan(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {1, true};
  if (lead < 0xc2 || lead > 0xf4) return {1, false};
  const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  // The second byte excludes overlong forms, surrogates and what is over U+10FFFF.
  const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (text.size() < 2 || byte(1) < low || byte(1) > high) return {1, false};
  for (size_t i = 2; i < length; ++i) {
    if (i >= text.size() || (byte(i) & 0xc0) != 0x80) return {i, false};
  }
  return {length, true};
}

}  // namespace

size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const Prefix prefix = scan(text);
  return prefix.whole ? prefix.length : 0;
}

uint32_t utf8_code_point(std::string_view text) {
  const size_t length = utf8_length(text);
  const auto lead = static_cast<unsigned char>(text[0]);
  uint32_t value = length == 1 ? lead : lead & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    value = value << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
  }
  return value;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t eight;
    if (i + 8 <= text.size()) {
      std::memcpy(&eight, text.data() + i, 8);
      if ((eight & 0x8080808080808080u) == 0) {  // ASCII
        i += 8;
        continue;
      }
    }
    const size_t length = utf8_length(text.substr(i));
    if (length == 0) return i;
    i += length;
  }
  return std::nullopt;
}

std::string repair_utf8(std::string text) {
  if (!find_invalid_utf8(text)) return text;
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const Prefix prefix = scan(std::string_view(text).substr(i));
    if (prefix.whole) {
      out.append(text, i, prefix.length);
    } else {
      out += "\uFFFD";
    }
    i += prefix.length;
  }
  return out;
}

}  // namespace twell::app
