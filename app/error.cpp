#include "app/error.h"

#include "app/util/utf8.h"

namespace twell::app {

std::string quote(std::string_view text) {
  constexpr size_t kLimit = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (size_t i = 0; i < text.size();) {
    if (i >= kLimit) return out + "...\"";
    const size_t length = utf8_length(text.substr(i));
    const auto byte = static_cast<unsigned char>(text[i]);
    // U+0080..U+009F, U+2028 and U+2029 break lines or drive terminals too.
    const std::string_view character = text.substr(i, length);
    const bool control = byte < 0x20 || byte == 0x7f || (byte == 0xc2 && character[1] < '\xa0') ||
                         character == "\u2028" || character == "\u2029";
    if (length == 0 || control) {
      for (char c : text.substr(i, length == 0 ? 1 : length)) {
        out += {'\\', 'x', kHex[(c >> 4) & 15], kHex[c & 15]};
      }
    } else {
      out += character;
    }
    i += length == 0 ? 1 : length;
  }
  return out + "\"";
}

}  // namespace twell::app
