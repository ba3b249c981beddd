#include "app/hf/tokenizer.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "app/error.h"
#include "app/hf/added_tokens.h"
#include "app/hf/bpe.h"
#include "app/hf/json.h"
#include "app/hf/nfc.h"
#include "app/hf/pre_tokenizer.h"
#include "app/util/file.h"
#include "app/util/utf8.h"

namespace twell::app {
namespace {

constexpr uint64_t kMaxFileBytes = 256 << 20;
constexpr size_t kMaxTextBytes = 1 << 30;  // NFC may lengthen it; positions in a word are 32-bit

// The `normalizer`: whether it is NFC (or none, or NFCs in a row).
bool read_normalizer(const JsonView& json) {
  const JsonView type = json["type"];
  if (type.string() == "NFC") {
    json.only({"type"});
    return true;
  }
  if (type.string() != "Sequence") type.refuse("\"NFC\" or \"Sequence\"");
  json.only({"type", "normalizers"});
  const JsonView parts = json["normalizers"];
  bool nfc = false;
  for (size_t i = 0; i < parts.size(); ++i) nfc |= read_normalizer(parts[i]);
  return nfc;
}

void check_decoder(const JsonView& json) {
  const JsonView type = json["type"];
  if (type.string() == "Sequence") {
    json.only({"type", "decoders"});
    const JsonView parts = json["decoders"];
    if (parts.size() != 1) parts.refuse("one ByteLevel");
    check_decoder(parts[0]);
  } else if (type.string() != "ByteLevel") {
    type.refuse("\"ByteLevel\"");
  }
}

// The ids that a post-processor puts before and after the text's.
struct Template {
  std::vector<int64_t> prefix;
  std::vector<int64_t> suffix;
};

class TemplateReader {
 public:
  explicit TemplateReader(const JsonView& json) { read(json); }
  Template take() { return std::move(result_); }

 private:
  void read(const JsonView& json) {
    const JsonView type = json["type"];
    if (type.string() == "Sequence") {
      json.only({"type", "processors"});
      const JsonView parts = json["processors"];
      for (size_t i = 0; i < parts.size(); ++i) read(parts[i]);
    } else if (type.string() == "TemplateProcessing") {
      if (seen_) json.fail("is a second TemplateProcessing, which is not supported");
      seen_ = true;
      read_template(json);
    } else if (type.string() != "ByteLevel") {  // which changes offsets only
      type.refuse("\"Sequence\", \"TemplateProcessing\" or \"ByteLevel\"");
    }
  }

  void read_template(const JsonView& json) {
    json.only({"type", "single", "pair", "special_tokens"});
    const JsonView single = json["single"];
    const JsonView special_tokens = json["special_tokens"];
    bool text_seen = false;
    for (size_t i = 0; i < single.size(); ++i) {
      const JsonView item = single[i];
      item.only({"Sequence", "SpecialToken"});
      if (item.value().size() != 1) item.refuse("a Sequence or a SpecialToken");
      if (const auto text = item.find("Sequence")) {
        if (text_seen || (*text)["id"].string() != "A") item.refuse("the one Sequence A");
        text_seen = true;
      } else {
        const JsonView name = item["SpecialToken"]["id"];
        const JsonView ids = special_tokens[name.string()]["ids"];
        auto& part = text_seen ? result_.suffix : result_.prefix;
        for (size_t j = 0; j < ids.size(); ++j) part.push_back(ids[j].integer(0, INT32_MAX));
      }
    }
    if (!text_seen) single.fail("has no Sequence A");
  }

  Template result_;
  bool seen_ = false;
};

}  // namespace

class Tokenizer::Impl {
 public:
  Impl(std::string text, const std::string& name) : json_(std::move(text)) {
    const nlohmann::json document = parse_json(json_, name);
    const JsonView json(document, name);
    json.only({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
               "post_processor", "decoder", "model"});
    if (json["version"].string() != "1.0") json["version"].refuse("\"1.0\"");
    for (const char* change : {"truncation", "padding"}) {
      if (const auto field = json.find(change)) field->refuse("null");
    }
    bpe_.emplace(json["model"]);
    pre_tokenizer_.emplace(json["pre_tokenizer"]);
    check_decoder(json["decoder"]);
    if (const auto normalizer = json.find("normalizer")) nfc_ = read_normalizer(*normalizer);
    if (const auto processor = json.find("post_processor")) {
      template_ = TemplateReader(*processor).take();
    }
    for (const auto& [token, id] : bpe_->vocabulary()) tokens_[id] = {token, false};
    if (const auto added = json.find("added_tokens")) add_tokens(*added);
    for (const auto* part : {&template_.prefix, &template_.suffix}) {
      for (const int64_t id : *part) {
        if (!tokens_.contains(id)) {
          json["post_processor"].fail("uses id " + std::to_string(id) + ", which has no token");
        }
      }
    }
    for (const auto& [id, token] : tokens_) id_limit_ = std::max(id_limit_, id + 1);
  }

  std::vector<int64_t> encode(std::string_view text, bool add_special_tokens) const {
    if (text.size() > kMaxTextBytes) {
      throw Error("a text of " + std::to_string(text.size()) +
                  " bytes is too long to tokenize: " + "at most " + std::to_string(kMaxTextBytes));
    }
    if (const auto offset = find_invalid_utf8(text)) {
      throw Error("cannot tokenize a text that is not UTF-8 at byte " + std::to_string(*offset));
    }
    const Borrowed scratch(*this);
    std::vector<int64_t> ids;
    const auto add_token = [&](const AddedToken& token) { ids.push_back(token.id); };
    const auto add_word = [&](std::string_view word) { bpe_->encode(word, scratch->bpe, ids); };
    const auto add_words = [&](std::string_view piece) {
      pre_tokenizer_->split(piece, scratch->regex, add_word);
    };
    const auto add_piece = [&](std::string_view piece) {
      const std::string normalized = nfc_ ? to_nfc(piece) : std::string();
      normalized_tokens_.split(nfc_ ? normalized : piece, scratch->regex, add_words, add_token);
    };
    if (add_special_tokens) ids = template_.prefix;
    raw_tokens_.split(text, scratch->regex, add_piece, add_token);
    if (add_special_tokens) {
      ids.insert(ids.end(), template_.suffix.begin(), template_.suffix.end());
    }
    return ids;
  }

  std::string decode(std::span<const int64_t> ids, bool skip_special_tokens) const {
    std::string bytes;
    for (const int64_t id : ids) {
      const auto entry = tokens_.find(id);
      if (entry == tokens_.end() || (skip_special_tokens && entry->second.special)) continue;
      bytes += bytes_of_token(entry->second.text).value_or(entry->second.text);
    }
    return repair_utf8(std::move(bytes));
  }

  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t id_limit() const { return id_limit_; }
  const std::string& json() const { return json_; }

  std::optional<int64_t> token_to_id(std::string_view token) const {
    if (const auto entry = added_.find(token); entry != added_.end()) return entry->second;
    const auto entry = bpe_->vocabulary().find(token);
    if (entry == bpe_->vocabulary().end()) return std::nullopt;
    return entry->second;
  }

  std::optional<std::string> id_to_token(int64_t id) const {
    const auto entry = tokens_.find(id);
    if (entry == tokens_.end()) return std::nullopt;
    return entry->second.text;
  }

 private:
  struct Scratch {
    Regex::Scratch regex;
    Bpe::Scratch bpe;
  };

  // A scratch from the pool, or a new one; given back at the end, with the words it has seen.
  class Borrowed {
   public:
    explicit Borrowed(const Impl& owner) : owner_(owner) {
      const std::lock_guard lock(owner_.mutex_);
      if (owner_.pool_.empty()) {
        scratch_ = std::make_unique<Scratch>();
      } else {
        scratch_ = std::move(owner_.pool_.back());
        owner_.pool_.pop_back();
      }
    }
    ~Borrowed() {
      const std::lock_guard lock(owner_.mutex_);
      owner_.pool_.push_back(std::move(scratch_));
    }
    Scratch* operator->() const { return scratch_.get(); }

   private:
    const Impl& owner_;
    std::unique_ptr<Scratch> scratch_;
  };

  struct Token {
    std::string text;
    bool special;
  };

  void add_tokens(const JsonView& json) {
    const std::vector<AddedToken> added = read_added_tokens(json, bpe_->vocabulary());
    StringMap<bool> special;
    for (const AddedToken& token : added) special[token.content] = token.special;
    for (const AddedToken& token : added) {
      const auto known = tokens_.find(token.id);
      if (known != tokens_.end() && known->second.text != token.content) {
        json.fail("gives " + quote(token.content) + " the id " + std::to_string(token.id) +
                  ", which is that of " + quote(known->second.text));
      }
      added_.emplace(token.content, token.id);
      // As in `tokenizers`, a token that is searched for in the normalized text is also decoded to
      // its normalized spelling, and that spelling says whether it is special.
      const std::string text = token.normalized && nfc_ ? to_nfc(token.content) : token.content;
      const auto spelling = special.find(text);
      tokens_[token.id] = {text, spelling != special.end() && spelling->second};
      if (!(token.normalized ? normalized_tokens_ : raw_tokens_).add(text, token)) {
        json.fail("has two tokens that are spelt " + quote(text) + " once normalized");
      }
    }
  }

  std::string json_;
  std::optional<Bpe> bpe_;
  std::optional<PreTokenizer> pre_tokenizer_;
  bool nfc_ = false;
  Template template_;
  AddedTokenFinder raw_tokens_;         // searched for in the text as it is
  AddedTokenFinder normalized_tokens_;  // searched for in the normalized text
  StringMap<TokenId> added_;
  std::unordered_map<int64_t, Token> tokens_;
  int64_t id_limit_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> pool_;
};

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  std::error_code ignored;
  const bool folder = std::filesystem::is_directory(path, ignored);
  const std::filesystem::path file = folder ? path / "tokenizer.json" : path;
  return Tokenizer(std::make_shared<Impl>(read_file(file, kMaxFileBytes), file.string()));
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& name) {
  return Tokenizer(std::make_shared<Impl>(std::string(json), name));
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  return impl_->encode(text, add_special_tokens);
}

std::string Tokenizer::decode(std::span<const int64_t> ids, bool skip_special_tokens) const {
  return impl_->decode(ids, skip_special_tokens);
}

int64_t Tokenizer::vocab_size() const { return impl_->vocab_size(); }
int64_t Tokenizer::id_limit() const { return impl_->id_limit(); }

std::optional<int64_t> Tokenizer::token_to_id(std::string_view token) const {
  return impl_->token_to_id(token);
}

std::optional<std::string> Tokenizer::id_to_token(int64_t id) const {
  return impl_->id_to_token(id);
}

const std::string& Tokenizer::json() const { return impl_->json(); }

}  // namespace twell::app
