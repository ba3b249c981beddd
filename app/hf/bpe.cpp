#include "app/hf/bpe.h"

#include <algorithm>
#include <cstdio>
#include <unordered_set>

#include "app/error.h"

namespace twell::app {
namespace {

constexpr size_t kMaxCachedWord = 128;  // bytes; longer words hardly ever repeat
constexpr size_t kMaxCachedWords = 1 << 17;

// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 on.
bool stands_for_itself(uint32_t code) {
  return (code >= 0x21 && code <= 0x7e) || (code >= 0xa1 && code <= 0xff && code != 0xad);
}

constexpr uint32_t kFirstMoved = 0x100;

const std::vector<uint8_t>& moved_bytes() {
  static const std::vector<uint8_t> kMoved = [] {
    std::vector<uint8_t> bytes;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      if (!stands_for_itself(byte)) bytes.push_back(static_cast<uint8_t>(byte));
    }
    return bytes;
  }();
  return kMoved;
}

uint64_t pair_key(TokenId left, TokenId right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

std::optional<std::string> bytes_of_token(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size(); ++i) {
    const auto lead = static_cast<unsigned char>(token[i]);
    uint32_t code = lead;
    if (lead >= 0x80) {  // the alphabet lies below U+0800: two bytes
      if (lead >= 0xe0 || i + 1 == token.size()) return std::nullopt;
      code = (lead & 0x1fu) << 6 | (static_cast<unsigned char>(token[++i]) & 0x3fu);
    }
    if (stands_for_itself(code)) {
      bytes += static_cast<char>(code);
    } else if (code >= kFirstMoved && code - kFirstMoved < moved_bytes().size()) {
      bytes += static_cast<char>(moved_bytes()[code - kFirstMoved]);
    } else {
      return std::nullopt;
    }
  }
  return bytes;
}

Bpe::Bpe(const JsonView& json) {
  json.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
             "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  // Files of early versions have no type. unk_token and fuse_unk matter only to tokenizers without
  // a token for every byte.
  if (const auto type = json.find("type"); type && type->string() != "BPE") type->refuse("\"BPE\"");
  if (const auto dropout = json.find("dropout")) dropout->number(0, 0);
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const auto field = json.find(affix); field && !field->string().empty()) {
      field->refuse("null or empty");
    }
  }
  if (const auto fallback = json.find("byte_fallback"); fallback && fallback->boolean()) {
    fallback->refuse("false: only byte-level BPE is supported");
  }
  if (const auto ignore = json.find("ignore_merges")) ignore_merges_ = ignore->boolean();
  read_vocabulary(json["vocab"]);
  read_merges(json["merges"]);
}

void Bpe::read_vocabulary(const JsonView& json) {
  if (!json.value().is_object()) json.refuse("an object");
  vocabulary_.reserve(json.value().size());
  byte_ids_.fill(-1);
  std::unordered_set<TokenId> seen;
  seen.reserve(json.value().size());
  for (const auto& [token, value] : json.value().get_ref<const nlohmann::json::object_t&>()) {
    const bool good = value.is_number_unsigned() && value.get<uint64_t>() <= INT32_MAX;
    if (!good) json[token].integer(0, INT32_MAX);  // throws
    const auto id = value.get<TokenId>();
    if (token.empty()) json.fail("has an empty token");
    if (!seen.insert(id).second) {
      json.fail("gives id " + std::to_string(id) + " to " + quote(token) + " and another token");
    }
    vocabulary_.emplace(token, id);
    const auto bytes = bytes_of_token(token);
    if (bytes && bytes->size() == 1) byte_ids_[static_cast<unsigned char>((*bytes)[0])] = id;
    if (bytes && ignore_merges_) whole_words_.emplace(*bytes, id);
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool in_utf8 = byte < 0xc0 || (byte > 0xc1 && byte < 0xf5);
    if (in_utf8 && byte_ids_[byte] < 0) {
      std::array<char, 8> text;
      std::snprintf(text.data(), text.size(), "0x%02X", byte);
      json.fail("has no token for byte " + std::string(text.data()) +
                "; train with the whole byte-level alphabet");
    }
  }
}

void Bpe::read_merges(const JsonView& json) {
  const size_t count = json.size();
  if (count > INT32_MAX) json.fail("has too many merges");
  merges_.reserve(count);
  std::string both;
  for (size_t i = 0; i < count; ++i) {
    const nlohmann::json& merge = json.value()[i];
    std::string_view left;
    std::string_view right;
    if (merge.is_string()) {
      const std::string_view text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        json[i].refuse("two tokens with one space between them");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      if (!merge.is_array() || merge.size() != 2) json[i].refuse("a pair of tokens");
      left = json[i][0].string();
      right = json[i][1].string();
    }
    const auto id_of = [&](std::string_view token) {
      const auto entry = vocabulary_.find(token);
      if (entry == vocabulary_.end()) {
        json[i].fail("needs token " + quote(token) + ", which is not in the vocabulary");
      }
      return entry->second;
    };
    const uint64_t key = pair_key(id_of(left), id_of(right));
    both.assign(left).append(right);
    // Of a merge that is listed twice, the last rank counts.
    merges_[key] = {static_cast<int32_t>(i), id_of(both)};
  }
}

const Bpe::Merge* Bpe::find_merge(TokenId left, TokenId right) const {
  const auto entry = merges_.find(pair_key(left, right));
  return entry == merges_.end() ? nullptr : &entry->second;
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& ids) const {
  const bool cached = word.size() <= kMaxCachedWord;
  if (cached) {
    if (const auto entry = scratch.cache.find(word); entry != scratch.cache.end()) {
      ids.insert(ids.end(), entry->second.begin(), entry->second.end());
      return;
    }
  }
  const size_t before = ids.size();
  const auto whole = ignore_merges_ ? whole_words_.find(word) : whole_words_.end();
  if (whole != whole_words_.end()) {
    ids.push_back(whole->second);
  } else {
    merge(word, scratch);
    for (int32_t i = 0; i >= 0; i = scratch.symbols[static_cast<size_t>(i)].next) {
      ids.push_back(scratch.symbols[static_cast<size_t>(i)].id);
    }
  }
  if (cached && scratch.cache.size() < kMaxCachedWords) {
    scratch.cache.try_emplace(std::string(word), ids.begin() + static_cast<ptrdiff_t>(before),
                              ids.end());
  }
}

// Applies the merge of the lowest rank, the leftmost of equals, until there is none. A heap holds
// the candidates; those that an earlier merge has overtaken are dropped when they come up.
void Bpe::merge(std::string_view word, Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  const auto later = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
  };
  const auto at = [&](int32_t i) -> Scratch::Symbol& { return symbols[static_cast<size_t>(i)]; };
  const auto merge_at = [&](int32_t left) -> const Merge* {
    return at(left).next < 0 ? nullptr : find_merge(at(left).id, at(at(left).next).id);
  };

  symbols.clear();
  heap.clear();
  const auto count = static_cast<int32_t>(word.size());
  for (int32_t i = 0; i < count; ++i) {
    const auto byte = static_cast<unsigned char>(word[static_cast<size_t>(i)]);
    symbols.push_back({byte_ids_[byte], i - 1, i + 1 < count ? i + 1 : -1});
  }
  for (int32_t i = 0; i < count; ++i) {
    if (const Merge* merge = merge_at(i)) heap.push_back({merge->rank, i, merge->merged});
  }
  std::make_heap(heap.begin(), heap.end(), later);

  const auto push = [&](int32_t left) {
    if (const Merge* merge = merge_at(left)) {
      heap.push_back({merge->rank, left, merge->merged});
      std::push_heap(heap.begin(), heap.end(), later);
    }
  };
  constexpr TokenId kGone = -1;
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    if (at(best.left).id == kGone) continue;
    const Merge* merge = merge_at(best.left);
    if (merge == nullptr || merge->rank != best.rank) continue;
    const int32_t right = at(best.left).next;
    const int32_t next = at(right).next;
    at(best.left).id = merge->merged;
    at(best.left).next = next;
    at(right).id = kGone;
    if (next >= 0) at(next).previous = best.left;
    if (at(best.left).previous >= 0) push(at(best.left).previous);
    push(best.left);
  }
}

}  // namespace twell::app
