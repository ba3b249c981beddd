#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace twell::app {

// A byte-level BPE tokenizer read from the tokenizer.json of Hugging Face's `tokenizers`; it gives
// the same ids as that package. Components it does not know are refused by name when loading.
// Cheap to copy (shares its tables) and safe to use from several threads.
class Tokenizer {
 public:
  // `path` is a tokenizer.json, or a folder that holds one.
  static Tokenizer load(const std::filesystem::path& path);
  // The same from the text of a tokenizer.json; `name` stands for the path in errors.
  static Tokenizer parse(std::string_view json, const std::string& name);

  // The ids of UTF-8 `text` (invalid UTF-8 throws Error with the byte's offset). With
  // `add_special_tokens` the post-processor's template (say, a leading bos) is applied.
  std::vector<int64_t> encode(std::string_view text, bool add_special_tokens = true) const;
  // The text of `ids`; bytes that form no UTF-8 become U+FFFD, as in `tokenizers`. Ids of no token
  // are left out.
  std::string decode(std::span<const int64_t> ids, bool skip_special_tokens = true) const;

  // The number of tokens, added ones included: `tokenizers`' get_vocab_size().
  int64_t vocab_size() const;
  // The largest id plus one: what an embedding table needs at least.
  int64_t id_limit() const;
  std::optional<int64_t> token_to_id(std::string_view token) const;
  // The token as decode() sees it: an added token that NFC changes comes out changed.
  std::optional<std::string> id_to_token(int64_t id) const;

  // The tokenizer.json it was read from, byte for byte, to be stored beside a checkpoint.
  const std::string& json() const;

 private:
  class Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace twell::app
