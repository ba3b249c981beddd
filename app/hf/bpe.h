#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "app/hf/json.h"

namespace twell::app {

// Hash maps keyed by std::string that are searched by std::string_view without a copy.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
template <typename T>
using StringMap = std::unordered_map<std::string, T, StringHash, std::equal_to<>>;

using TokenId = int32_t;

// The bytes that a token of byte-level BPE stands for: each of its characters is one byte in
// GPT-2's printable alphabet. Nothing if one of them is not.
std::optional<std::string> bytes_of_token(std::string_view token);

// The `model` of a tokenizer.json, of type BPE.
class Bpe {
 public:
  // What a thread needs to encode; keeps the ids of the words it has seen.
  class Scratch {
   private:
    friend class Bpe;
    struct Symbol {
      TokenId id;
      int32_t previous;  // index, -1 at the start
      int32_t next;      // index, -1 at the end
    };
    struct Candidate {
      int32_t rank;
      int32_t left;  // index of the left symbol
      TokenId merged;
    };
    StringMap<std::vector<TokenId>> cache;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  // Throws Error for ill-formed or unsupported models, and for a vocabulary without a token for
  // each byte that UTF-8 uses.
  explicit Bpe(const JsonView& json);

  // Appends the ids of one word of at most INT32_MAX bytes.
  void encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& ids) const;

  const StringMap<TokenId>& vocabulary() const { return vocabulary_; }

 private:
  struct Merge {
    int32_t rank;
    TokenId merged;
  };

  void read_vocabulary(const JsonView& json);
  void read_merges(const JsonView& json);
  const Merge* find_merge(TokenId left, TokenId right) const;
  // Leaves the chain of merged symbols in scratch.symbols, from index 0.
  void merge(std::string_view word, Scratch& scratch) const;

  StringMap<TokenId> vocabulary_;
  StringMap<TokenId> whole_words_;  // by bytes; only with ignore_merges
  std::array<TokenId, 256> byte_ids_;
  std::unordered_map<uint64_t, Merge> merges_;  // by (left << 32 | right)
  bool ignore_merges_ = false;
};

}  // namespace twell::app
