#include "app/hf/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

std::vector<std::filesystem::path> files_in(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end(),
            [](const auto& a, const auto& b) { return a.stem().string() < b.stem().string(); });
  return files;
}

std::vector<int32_t> read_ids(const std::filesystem::path& path) {
  const std::string bytes = contents(path);
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  std::memcpy(ids.data(), bytes.data(), bytes.size());
  return ids;
}

class TokenizerKind : public testing::TestWithParam<const char*> {
 protected:
  const std::filesystem::path folder_ = fixtures() / "tokenizers" / GetParam();
  const Tokenizer tokenizer_ = Tokenizer::load(folder_);
};

TEST_P(TokenizerKind, EncodesAsTheTokenizersPackage) {
  const std::vector<int32_t> expected = read_ids(folder_ / "ids.bin");
  auto next = expected.begin();
  for (const auto& file : files_in(fixtures() / "texts")) {
    const std::string text = contents(file);
    for (const bool special : {true, false}) {
      const std::vector<int64_t> ids = tokenizer_.encode(text, special);
      ASSERT_NE(next, expected.end());
      const std::vector<int64_t> want(next + 1, next + 1 + *next);
      next += 1 + *next;
      const auto place = std::mismatch(ids.begin(), ids.end(), want.begin(), want.end());
      if (place.first == ids.end() && place.second == want.end()) continue;
      const auto tail = [&](auto from, const std::vector<int64_t>& all) {
        std::vector<int64_t> few(from, from + std::min<ptrdiff_t>(8, all.end() - from));
        std::string shown;
        for (const int64_t id : few) shown += tokenizer_.id_to_token(id).value_or("?") + "|";
        return shown;
      };
      FAIL() << file << " differs at token " << place.first - ids.begin() << ": "
             << tail(place.first, ids) << " should be " << tail(place.second, want);
    }
  }
  EXPECT_EQ(next, expected.end());
}

TEST_P(TokenizerKind, DecodesAsTheTokenizersPackage) {
  const auto cases = nlohmann::json::parse(contents(folder_ / "decode.json"));
  ASSERT_GT(cases.size(), 100u);
  for (const auto& one : cases) {
    const auto ids = one["ids"].get<std::vector<int64_t>>();
    EXPECT_EQ(tokenizer_.decode(ids, one["skip"].get<bool>()), one["text"].get<std::string>());
  }
}

TEST_P(TokenizerKind, DecodeUndoesEncode) {
  if (std::set<std::string>{"digits", "contiguous", "gpt2_prefix_space", "qwen2", "deepseek"}
          .contains(GetParam())) {
    GTEST_SKIP() << "removes, adds or normalizes text";
  }
  for (const auto& file : files_in(fixtures() / "texts")) {
    if (file.stem() == "added_tokens") continue;  // which swallow white space
    const std::string text = contents(file);
    EXPECT_EQ(tokenizer_.decode(tokenizer_.encode(text, false), false), text) << file;
  }
}

TEST_P(TokenizerKind, LooksTokensUp) {
  int64_t found = 0;
  for (int64_t id = 0; id < tokenizer_.id_limit(); ++id) {
    const auto token = tokenizer_.id_to_token(id);
    if (!token) continue;
    ++found;
    const bool respelt = token == "\u00e9galit\u00e9";  // by NFC
    EXPECT_EQ(tokenizer_.token_to_id(*token), respelt ? std::nullopt : std::optional(id));
  }
  EXPECT_EQ(found, tokenizer_.vocab_size());
  EXPECT_EQ(tokenizer_.id_to_token(-1), std::nullopt);
  EXPECT_EQ(tokenizer_.id_to_token(tokenizer_.id_limit()), std::nullopt);
  EXPECT_EQ(tokenizer_.token_to_id("no such token"), std::nullopt);
}

INSTANTIATE_TEST_SUITE_P(Kinds, TokenizerKind,
                         testing::Values("gpt2", "gpt2_prefix_space", "llama3", "qwen2", "o200k",
                                         "deepseek", "digits", "contiguous"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace twell::app
