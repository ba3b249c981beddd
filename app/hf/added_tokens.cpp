#include "app/hf/added_tokens.h"

#include <algorithm>

#include "app/error.h"
#include "app/util/utf8.h"

namespace twell::app {
namespace {

constexpr int64_t kMaxTokens = 1 << 20;

// White_Space of Unicode, which has been the same since 6.3.
bool is_white_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

// The last character of `text`, empty if there is none.
std::string_view last_character(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0 && (static_cast<unsigned char>(text[--begin]) & 0xc0) == 0x80) continue;
  return text.substr(begin);
}

std::string_view first_character(std::string_view text) {
  return text.substr(0, utf8_length(text));
}

// \w of Unicode TR 18: Alphabetic, marks, decimal digits, connector punctuation, join controls.
// Alphabetic is the letters, the letter numbers, marks, and circled and squared letters.
bool is_word(std::string_view character, Regex::Scratch& scratch) {
  static const Regex kWord(
      "[\\p{L}\\p{M}\\p{Nl}\\p{Nd}\\p{Pc}\u200c\u200d\u24b6-\u24e9"
      "\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]",
      "word");
  return kWord.find(character, 0, scratch).has_value();
}

}  // namespace

std::vector<AddedToken> read_added_tokens(const JsonView& json,
                                          const StringMap<TokenId>& vocabulary) {
  std::vector<AddedToken> tokens;
  if (json.size() > kMaxTokens) json.refuse("at most " + std::to_string(kMaxTokens) + " tokens");
  StringMap<TokenId> seen;
  const auto size = static_cast<TokenId>(vocabulary.size());
  TokenId next = size;
  for (size_t i = 0; i < json.size(); ++i) {
    const JsonView entry = json[i];
    entry.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token;
    token.content = entry["content"].string();
    token.id = static_cast<TokenId>(entry["id"].integer(0, INT32_MAX));
    token.special = entry["special"].boolean();
    token.normalized = entry["normalized"].boolean();
    token.single_word = entry["single_word"].boolean();
    token.lstrip = entry["lstrip"].boolean();
    token.rstrip = entry["rstrip"].boolean();
    if (token.content.empty()) entry.fail("has an empty \"content\"");
    const auto known = vocabulary.find(token.content);
    const TokenId expected = known == vocabulary.end() ? next : known->second;
    if (token.id != expected) {
      entry["id"].refuse(std::to_string(expected) + (known == vocabulary.end()
                                                         ? ", the next id that is free"
                                                         : ", the token's id in the vocabulary"));
    }
    if (!seen.emplace(token.content, token.id).second) {
      entry.fail("repeats the token " + quote(token.content));
    }
    if (token.id >= next) next = token.id + 1;
    tokens.push_back(std::move(token));
  }
  return tokens;
}

bool AddedTokenFinder::add(std::string_view pattern, const AddedToken& token) {
  uint64_t node = 0;
  for (const char c : pattern) {
    const auto [child, added] =
        children_.emplace(node << 8 | static_cast<unsigned char>(c), token_at_.size());
    if (added) token_at_.push_back(-1);
    node = child->second;
  }
  if (token_at_[node] >= 0) return false;
  is_first_byte_[static_cast<unsigned char>(pattern[0])] = true;
  token_at_[node] = static_cast<int64_t>(tokens_.size());
  tokens_.push_back(token);
  return true;
}

AddedTokenFinder::Match AddedTokenFinder::find(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!is_first_byte_[static_cast<unsigned char>(text[begin])]) continue;
    Match match{nullptr, begin, begin};
    uint64_t node = 0;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto child = children_.find(node << 8 | static_cast<unsigned char>(text[i]));
      if (child == children_.end()) break;
      node = child->second;
      if (const int64_t index = token_at_[node]; index >= 0) {
        match = {&tokens_[static_cast<size_t>(index)], begin, i + 1};
      }
    }
    if (match.token != nullptr) return match;
  }
  return {nullptr, text.size(), text.size()};
}

void AddedTokenFinder::split(std::string_view text, Regex::Scratch& scratch,
                             const std::function<void(std::string_view)>& visit_text,
                             const std::function<void(const AddedToken&)>& visit_token) const {
  size_t done = 0;  // what lies before has been visited
  const auto visit_until = [&](size_t end) {
    if (end > done) visit_text(text.substr(done, end - done));
  };
  for (size_t from = 0;;) {
    Match match = find(text, from);
    if (match.token == nullptr) break;
    from = match.end;
    const std::string_view before = text.substr(0, match.begin);
    const std::string_view after = text.substr(match.end);
    if (match.token->single_word &&
        (is_word(last_character(before), scratch) || is_word(first_character(after), scratch))) {
      continue;
    }
    while (match.token->lstrip && match.begin > done) {
      const std::string_view character = last_character(text.substr(0, match.begin));
      if (!is_white_space(utf8_code_point(character))) break;
      match.begin -= character.size();
    }
    while (match.token->rstrip && match.end < text.size()) {
      const std::string_view character = first_character(text.substr(match.end));
      if (!is_white_space(utf8_code_point(character))) break;
      match.end += character.size();
    }
    visit_until(match.begin);
    visit_token(*match.token);
    done = match.end;
  }
  visit_until(text.size());
}

}  // namespace twell::app
