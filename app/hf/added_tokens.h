#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "app/hf/bpe.h"
#include "app/hf/json.h"
#include "app/hf/regex.h"

namespace twell::app {

struct AddedToken {
  std::string content;
  TokenId id = 0;
  bool special = false;      // left out by decode
  bool normalized = false;   // searched for in the normalized text
  bool single_word = false;  // not next to a letter or digit
  bool lstrip = false;       // swallows the white space to its left
  bool rstrip = false;       // ... to its right
};

// Reads the `added_tokens`. Their ids must be those that `tokenizers` gives them: the vocabulary's
// if it has the token, else the next free one.
std::vector<AddedToken> read_added_tokens(const JsonView& json,
                                          const StringMap<TokenId>& vocabulary);

// Finds tokens in a text: leftmost first, the longest of those.
class AddedTokenFinder {
 public:
  // Adds a token that is spelt `pattern` in the text; false if another one is.
  bool add(std::string_view pattern, const AddedToken& token);

  // Cuts `text` into tokens and the pieces between them, in order.
  void split(std::string_view text, Regex::Scratch& scratch,
             const std::function<void(std::string_view)>& visit_text,
             const std::function<void(const AddedToken&)>& visit_token) const;

 private:
  struct Match {
    const AddedToken* token;
    size_t begin;
    size_t end;
  };
  // The next match at or after `from`; its token is null if there is none.
  Match find(std::string_view text, size_t from) const;

  std::array<bool, 256> is_first_byte_{};
  // A trie over bytes: children_ by (node << 8 | byte), node 0 is the root.
  std::unordered_map<uint64_t, uint32_t> children_;
  std::vector<int64_t> token_at_ = {-1};  // per node: index into tokens_, or -1
  std::vector<AddedToken> tokens_;
};

}  // namespace twell::app
