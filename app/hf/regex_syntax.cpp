// The translation from Oniguruma's syntax to PCRE2's.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "app/error.h"
#include "app/hf/regex.h"
#include "app/hf/unicode_additions.h"
#include "app/util/utf8.h"

namespace twell::app {
namespace {

constexpr size_t kMaxPattern = 1 << 16;
constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
constexpr std::string_view kDigits = "0123456789";
constexpr std::string_view kCategories[] = {"C",  "Cc", "Cf", "Co", "L",  "Ll", "Lm", "Lo", "Lt",
                                            "Lu", "M",  "Mc", "Me", "Mn", "N",  "Nd", "Nl", "No",
                                            "P",  "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "S",
                                            "Sc", "Sk", "Sm", "So", "Z",  "Zl", "Zp", "Zs"};

std::string hex(uint32_t code_point) {
  std::array<char, 16> text;
  std::snprintf(text.data(), text.size(), "\\x{%X}", code_point);
  return text.data();
}

// The members of \p{category} as items of a class.
std::string category_items(std::string_view category) {
  std::string items = "\\p{" + std::string(category) + "}";
  for (const UnicodeAddition& addition : kUnicodeAdditions) {
    if (std::string_view(addition.category).starts_with(category)) {
      items += hex(addition.first);
      if (addition.last > addition.first) items += "-" + hex(addition.last);
    }
  }
  return items;
}

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& place)
      : pattern_(pattern), place_(place) {}

  std::string run() {
    if (pattern_.empty()) refuse("is empty");
    if (pattern_.size() > kMaxPattern) refuse("has over " + std::to_string(kMaxPattern) + " bytes");
    if (find_invalid_utf8(pattern_)) refuse("is not UTF-8");
    while (!done()) term();
    if (!groups_.empty()) refuse("has a ( without )");
    return out_;
  }

 private:
  // One item of a class: a single code point, or a set given as items.
  struct Item {
    std::optional<uint32_t> code_point;
    std::string items;
    bool negated = false;  // \S, \D, \P{..}
  };

  [[noreturn]] void refuse(const std::string& problem) const {
    throw Error(place_ + ": pattern " + quote(pattern_) + " " + problem);
  }
  [[noreturn]] void unsupported(std::string_view syntax) const {
    refuse("uses " + quote(syntax) + " at byte " + std::to_string(next_) +
           ", which is not supported");
  }

  bool done() const { return next_ == pattern_.size(); }
  std::string_view rest() const { return pattern_.substr(next_); }
  bool accept(std::string_view token) {
    if (!rest().starts_with(token)) return false;
    next_ += token.size();
    return true;
  }
  bool caseless() const { return std::count(groups_.begin(), groups_.end(), true) > 0; }

  uint32_t code_point() {
    const uint32_t value = utf8_code_point(rest());
    next_ += utf8_length(rest());
    return value;
  }

  // What follows a backslash.
  Item escape() {
    constexpr std::string_view kControls = "rntf";
    constexpr std::string_view kValues = "\r\n\t\f";
    const size_t start = next_ - 1;
    if (done()) refuse("ends with a backslash");
    const char c = pattern_[next_];
    if (const size_t i = kControls.find(c); i != std::string_view::npos) {
      ++next_;
      return {static_cast<uint32_t>(kValues[i]), "", false};
    }
    if (c == 's' || c == 'S') {
      ++next_;
      return {std::nullopt, "\\p{White_Space}", c == 'S'};
    }
    if (c == 'd' || c == 'D') {
      ++next_;
      return {std::nullopt, category_items("Nd"), c == 'D'};
    }
    if (c == 'p' || c == 'P') {
      const size_t close = rest().starts_with("p{") || rest().starts_with("P{")
                               ? pattern_.find('}', next_)
                               : std::string_view::npos;
      const std::string_view name =
          close == std::string_view::npos ? "" : pattern_.substr(next_ + 2, close - next_ - 2);
      if (std::find(std::begin(kCategories), std::end(kCategories), name) ==
          std::end(kCategories)) {
        next_ = start;
        unsupported(close == std::string_view::npos ? pattern_.substr(start, 2)
                                                    : pattern_.substr(start, close - start + 1));
      }
      next_ = close + 1;
      return {std::nullopt, category_items(name), c == 'P'};
    }
    const bool word =
        kLetters.find(c) != std::string_view::npos || kDigits.find(c) != std::string_view::npos;
    if (word || static_cast<unsigned char>(c) >= 0x80) {
      next_ = start;
      unsupported(pattern_.substr(start, 1 + std::max<size_t>(1, utf8_length(rest().substr(1)))));
    }
    return {code_point(), "", false};
  }

  Item class_item() {
    if (done()) refuse("has a [ without ]");
    if (accept("\\")) return escape();
    if (rest().starts_with("[") || rest().starts_with("&&")) unsupported(rest().substr(0, 2));
    return {code_point(), "", false};
  }

  // What follows a [.
  void character_class() {
    std::string items;
    const bool negated = accept("^");
    if (rest().starts_with("]")) unsupported("[]");
    while (!accept("]")) {
      const Item item = class_item();
      const bool range = rest().starts_with("-") && !rest().starts_with("-]");
      if (item.negated && item.items != "\\p{White_Space}") unsupported("negation in a class");
      if (!item.code_point) {
        if (range) unsupported("-");
        items += item.negated ? "\\P{White_Space}" : item.items;
        continue;
      }
      items += hex(*item.code_point);
      if (!range) continue;
      ++next_;
      const Item last = class_item();
      if (!last.code_point || *last.code_point < *item.code_point) refuse("has a bad range");
      items += "-" + hex(*last.code_point);
    }
    out_ += (negated ? "[^" : "[") + items + "]";
  }

  // What follows a (.
  void group() {
    constexpr std::string_view kKinds[] = {"?:", "?>", "?=", "?!", "?<=", "?<!"};
    for (const std::string_view kind : kKinds) {
      if (accept(kind)) {
        out_ += "(" + std::string(kind);
        groups_.push_back(false);
        return;
      }
    }
    if (accept("?i:")) {
      out_ += "(?i:";
      groups_.push_back(true);
      return;
    }
    if (rest().starts_with("?")) unsupported("(" + std::string(rest().substr(0, 3)));
    out_ += "(?:";
    groups_.push_back(false);
  }

  void literal(uint32_t code_point) {
    if (caseless()) {
      // Oniguruma lets one character match these two letters: ß, the ligatures ff, fi, fl, st.
      const char letter = code_point < 0x80 ? static_cast<char>(code_point | 0x20) : '\0';
      const std::string pair = {previous_letter_, letter};
      for (const char* folded : {"ss", "st", "ff", "fi", "fl"}) {
        if (pair == folded) unsupported("(?i:" + pair + ")");
      }
      if (code_point >= 0x80) unsupported("(?i: around characters that are not ASCII");
      letter_ = letter;
    }
    out_ += hex(code_point);
  }

  // What follows a {, which must be a quantifier n}, n,} or n,m}.
  void interval() {
    const size_t start = next_;
    const auto number = [&] {
      const size_t first = next_;
      while (!done() && kDigits.find(pattern_[next_]) != std::string_view::npos) ++next_;
      return next_ > first;
    };
    bool good = number();
    if (good && accept(",")) number();
    good = good && accept("}");
    if (!good || rest().starts_with("?") || rest().starts_with("+")) {
      next_ = start - 1;
      unsupported(rest().substr(0, 8));
    }
    out_ += pattern_.substr(start - 1, next_ - start + 1);
  }

  void term() {
    previous_letter_ = std::exchange(letter_, '\0');
    if (accept("\\")) {
      const Item item = escape();
      if (item.code_point) {
        literal(*item.code_point);
      } else {
        out_ += (item.negated ? "[^" : "[") + item.items + "]";
      }
    } else if (accept("[")) {
      if (caseless()) unsupported("(?i: around a class");
      character_class();
    } else if (accept("(")) {
      group();
    } else if (accept(")")) {
      if (groups_.empty()) refuse("has a ) without (");
      groups_.pop_back();
      out_ += ')';
    } else if (accept("{")) {
      interval();
    } else if (constexpr std::string_view kOperators = "|.^$*+?";
               kOperators.find(pattern_[next_]) != std::string_view::npos) {
      out_ += pattern_[next_++];
    } else {
      literal(code_point());
    }
  }

  const std::string_view pattern_;
  const std::string& place_;
  size_t next_ = 0;
  std::string out_;
  std::vector<bool> groups_;     // the open ones: whether they are (?i:
  char previous_letter_ = '\0';  // of the term before, if it was a caseless letter
  char letter_ = '\0';
};

}  // namespace

std::string translate_pattern(std::string_view pattern, const std::string& place) {
  return Translator(pattern, place).run();
}

}  // namespace twell::app
