#include "app/hf/nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "app/error.h"
#include "app/hf/unicode_additions.h"
#include "app/util/utf8.h"

namespace twell::app {
namespace {

using Range = std::pair<uint32_t, uint32_t>;  // first, last

// Marks of Unicode 10 to 14 that are reordered (combining class above 0) or compose.
constexpr Range kMarks[] = {
    {0x07fd, 0x07fd},   {0x0898, 0x089f},   {0x08ca, 0x08d3},   {0x09fe, 0x09fe},
    {0x0c3c, 0x0c3c},   {0x0d3b, 0x0d3c},   {0x0eba, 0x0eba},   {0x1715, 0x1715},
    {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x10d24, 0x10d27},
    {0x10eab, 0x10eac}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070},
    {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11930, 0x11930},
    {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34},
    {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x16ff0, 0x16ff1}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
    {0x1e2ec, 0x1e2ef}};

// Whether the normalizer's tables lack `code_point`, so that it stays as it is.
bool is_newer(uint32_t code_point) {
  static const std::vector<Range> kRanges = [] {
    std::vector<Range> ranges(std::begin(kMarks), std::end(kMarks));
    for (const UnicodeAddition& addition : kUnicodeAdditions) {
      ranges.emplace_back(addition.first, addition.last);
    }
    std::sort(ranges.begin(), ranges.end());
    return ranges;
  }();
  const auto after =
      std::upper_bound(kRanges.begin(), kRanges.end(), Range(code_point, UINT32_MAX));
  return after != kRanges.begin() && std::prev(after)->second >= code_point;
}

// Appends the NFC of `text`, which has no newer code points.
void append_nfc(std::string_view text, std::string& out) {
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &result,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  if (size < 0) throw Error(std::string("cannot normalize a text: ") + utf8proc_errmsg(size));
  out.append(reinterpret_cast<const char*>(result), static_cast<size_t>(size));
}

}  // namespace

std::string to_nfc(std::string_view text) {
  std::string out;
  if (std::none_of(text.begin(), text.end(), [](char c) { return (c & 0x80) != 0; })) {
    return out = text;  // ASCII
  }
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.substr(i));
    if (length > 1 && is_newer(utf8_code_point(text.substr(i)))) {
      append_nfc(text.substr(done, i - done), out);
      out += text.substr(i, length);
      done = i + length;
    }
    i += length;
  }
  append_nfc(text.substr(done), out);
  return out;
}

}  // namespace twell::app
