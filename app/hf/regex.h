#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace twell::app {

// Rewrites a pattern of a tokenizer.json (Oniguruma's syntax) so that PCRE2 matches the same text:
// \s becomes \p{White_Space}, \p{..} gets the code points of Unicode 16, literals become \x{..}.
// Known: literals, \r \n \t \f \s \S \d \D \p{..} \P{..} (general categories), escaped punctuation,
// classes, ranges, groups (plain, ?: ?> ?= ?! ?<= ?<! and ?i: around ASCII), | . ^ $ and the
// quantifiers * + ? {..}. Anything else throws Error, starting with `place` and naming it.
std::string translate_pattern(std::string_view pattern, const std::string& place);

// A compiled pattern. Matching is const; each thread brings its own Scratch.
class Regex {
 public:
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class Regex;
    struct Data;
    std::unique_ptr<Data> data_;
  };

  // Throws Error, starting with `place`, if the pattern is not understood or can match the empty
  // string.
  Regex(std::string_view pattern, const std::string& place);

  // The first match of UTF-8 `text` at or after byte `from`: [begin, end). Throws Error if the
  // pattern takes too many steps.
  std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from,
                                                Scratch& scratch) const;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace twell::app
