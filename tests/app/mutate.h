#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

#include "app/error.h"

namespace twell::app {

// Feeds `parse` with `count` mutations of the well-formed `seed`, always the same ones: bytes
// flipped, removed, repeated, moved, and tokens of JSON put in. It may succeed or throw an Error of
// one line of readable length; anything else fails the test.
inline void survive_mutations(const std::string& seed, int count,
                              const std::function<void(const std::string&)>& parse) {
  constexpr const char* kTokens[] = {"{",
                                     "}",
                                     "[",
                                     "]",
                                     ",",
                                     ":",
                                     "\"",
                                     "null",
                                     "true",
                                     "-1",
                                     "0",
                                     "1.5",
                                     "1e999",
                                     "\\u0",
                                     "\\",
                                     "[[[[[[",
                                     "{\"a\":",
                                     "\xff",
                                     "\xc3",
                                     "18446744073709551616",
                                     "9223372036854775807"};
  std::mt19937_64 random(12345);
  const auto below = [&](size_t limit) { return random() % limit; };
  int refused = 0;
  for (int i = 0; i < count; ++i) {
    std::string text = seed;
    for (size_t edits = 1 + below(4); edits > 0 && !text.empty(); --edits) {
      const size_t at = below(text.size());
      const size_t length = std::min(text.size() - at, size_t{1} + below(16));
      switch (below(6)) {
        case 0:
          text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
          break;
        case 1:
          text[at] = static_cast<char>(below(256));
          break;
        case 2:
          text.erase(at, length);
          break;
        case 3:
          text.insert(at, text.substr(at, length));
          break;
        case 4:
          text.insert(at, kTokens[below(std::size(kTokens))]);
          break;
        default:
          text.insert(below(text.size()), text.substr(at, length));
      }
    }
    try {
      parse(text);
    } catch (const Error& error) {
      ++refused;
      const std::string message = error.what();
      ASSERT_LT(message.size(), 1000u) << message;
      ASSERT_EQ(message.find_first_of("\n\r\x1b"), std::string::npos) << message;
    }
  }
  EXPECT_GT(refused, count / 10);
}

}  // namespace twell::app
