#include "app/hf/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/app/fixtures.h"
#include "tests/app/mutate.h"

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

// Those that neither remove, add nor normalize text.
class LosslessKind : public TokenizerKind {};

TEST_P(LosslessKind, DecodeUndoesEncode) {
  for (const auto& file : files_in(fixtures() / "texts")) {
    if (file.stem() == "added_tokens") continue;  // which swallow white space
    const std::string text = contents(file);
    EXPECT_EQ(tokenizer_.decode(tokenizer_.encode(text, false), false), text) << file;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, LosslessKind, testing::Values("gpt2", "llama3", "o200k"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Tokenizer, GivesTheSameFromManyThreads) {
  const Tokenizer tokenizer = Tokenizer::load(fixtures() / "tokenizers/llama3");
  const std::string text = contents(fixtures() / "texts/random.txt");
  const auto expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::vector<int> same(4);
  for (int& flag : same) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) flag += tokenizer.encode(text) == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(same, std::vector<int>(4, 5));
}

TEST(Tokenizer, HandlesEmptyAndIllFormedText) {
  const Tokenizer tokenizer = Tokenizer::load(fixtures() / "tokenizers/gpt2/tokenizer.json");
  EXPECT_TRUE(tokenizer.encode("").empty());
  EXPECT_EQ(tokenizer.decode({}), "");
  EXPECT_ERROR(tokenizer.encode("ab\xff"), "byte 2");
  EXPECT_ERROR(tokenizer.encode("\xed\xa0\x80"), "byte 0");  // a surrogate
  EXPECT_ERROR(tokenizer.encode("a\xc3"), "byte 1");
  const Tokenizer llama = Tokenizer::load(fixtures() / "tokenizers/llama3");
  EXPECT_EQ(llama.encode("").size(), 2u);  // bos and eos
}

// A word of a megabyte takes n log n steps, not n squared.
TEST(Tokenizer, EncodesALongWord) {
  const Tokenizer tokenizer = Tokenizer::load(fixtures() / "tokenizers/llama3");
  const std::string word(1 << 20, 'e');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(word)), word);
}

class HostileTokenizer : public testing::Test {
 protected:
  using Json = nlohmann::json;
  using Pointer = nlohmann::json::json_pointer;

  // Parses the good file with the value at `pointer` replaced.
  void expect(const char* pointer, const Json& value, const std::string& part) const {
    Json changed = good_;
    changed[Pointer(pointer)] = value;
    EXPECT_ERROR(Tokenizer::parse(changed.dump(), "t.json"), part);
  }
  void accept(const char* pointer, const Json& value) const {
    Json changed = good_;
    changed[Pointer(pointer)] = value;
    EXPECT_NO_THROW(Tokenizer::parse(changed.dump(), "t.json")) << pointer << value;
  }

  const Json good_ = Json::parse(contents(fixtures() / "tokenizers/llama3/tokenizer.json"));
};

TEST_F(HostileTokenizer, RefusesBadJson) {
  EXPECT_ERROR(Tokenizer::load("/nonexistent"), "/nonexistent");
  for (const char* text : {"", "{", "[]", "null", "{}", "{\"version\":\"1.0\"}", "\xff", "{} {}"}) {
    EXPECT_NE(error_of([&] { Tokenizer::parse(text, "t.json"); }), "no error") << text;
  }
  EXPECT_ERROR(Tokenizer::parse(std::string(1 << 20, '['), "t.json"), "deeper");
  EXPECT_ERROR(Tokenizer::parse("{\"a\":1,\"a\":2}", "t.json"), "twice");
  EXPECT_ERROR(Tokenizer::parse("{\"version\":1e999}", "t.json"), "out of range");
  EXPECT_ERROR(Tokenizer::parse("{\"\xff\":1}", "t.json"), "not valid JSON");
}

TEST_F(HostileTokenizer, RefusesWhatItDoesNotSupport) {
  expect("/version", "2.0", "\"1.0\"");
  expect("/extra", 1, "\"extra\"");
  expect("/truncation", Json::object(), "\"truncation\"");
  expect("/padding", Json::object(), "\"padding\"");
  expect("/normalizer", {{"type", "NFKC"}}, "NFKC");
  expect("/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}},
         "normalizers[0]");
  accept("/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}});
  expect("/decoder", nullptr, "\"decoder\"");
  expect("/decoder/type", "Metaspace", "Metaspace");
  expect("/pre_tokenizer", nullptr, "\"pre_tokenizer\"");
  expect("/pre_tokenizer", {{"type", "Metaspace"}}, "Metaspace");
  expect("/pre_tokenizer/pretokenizers", Json::array(), "ByteLevel");
  expect("/pre_tokenizer/pretokenizers/2", good_["pre_tokenizer"]["pretokenizers"][0], "follows");
  expect("/pre_tokenizer/pretokenizers/0/behavior", "Sideways", "Sideways");
  expect("/pre_tokenizer/pretokenizers/0/invert", 1, "true or false");
  expect("/pre_tokenizer/pretokenizers/0/pattern", Json::object(), "Regex");
  expect("/post_processor", {{"type", "BertProcessing"}}, "BertProcessing");
  expect("/post_processor/processors/2", good_["post_processor"]["processors"][1], "second");
  expect("/post_processor/processors/1/single", Json::array(), "Sequence A");
  expect("/post_processor/processors/1/special_tokens", Json::object(), "<|bos|>");
  expect("/post_processor/processors/1/special_tokens/<|bos|>/ids/0", 99999, "99999");
  for (const char* type : {"WordPiece", "Unigram", "WordLevel"}) expect("/model/type", type, type);
  expect("/model/dropout", 0.1, "dropout");
  expect("/model/byte_fallback", true, "byte_fallback");
  expect("/model/end_of_word_suffix", "</w>", "</w>");
  expect("/model/continuing_subword_prefix", "##", "##");
  accept("/model/end_of_word_suffix", "");
  accept("/model/unk_token", "<|bos|>");
}

TEST_F(HostileTokenizer, RefusesBadVocabulariesAndMerges) {
  expect("/model/vocab", Json::array(), "an object");
  expect("/model/vocab", Json::object(), "byte 0x00");
  expect("/model/vocab/A", "x", "an integer");
  expect("/model/vocab/A", -1, "-1");
  expect("/model/vocab/A", 1.5, "1.5");
  expect("/model/vocab/A", 2147483648, "2147483648");
  expect("/model/vocab/A", good_["model"]["vocab"]["B"], "another token");
  expect("/model/vocab/", 5000, "empty token");
  Json without = good_;
  without["model"]["vocab"].erase("A");
  EXPECT_ERROR(Tokenizer::parse(without.dump(), "t.json"), "byte 0x41");
  expect("/model/merges", Json::object(), "an array");
  expect("/model/merges/0", 5, "model.merges[0]");
  expect("/model/merges/0", {"a"}, "a pair of tokens");
  expect("/model/merges/0", {"a", 1}, "a string");
  expect("/model/merges/0", "ab", "one space");
  expect("/model/merges/0", "a b c", "one space");
  expect("/model/merges/0", {"a", "missing"}, "\"missing\"");
  expect("/model/merges/0", {"Z", "\u0120"}, "not in the vocabulary");
}

TEST_F(HostileTokenizer, RefusesBadAddedTokens) {
  expect("/added_tokens/0/id", 7777, "7777");
  expect("/added_tokens/1/id", 0, "the next id that is free");
  expect("/added_tokens/1/content", "", "empty");
  expect("/added_tokens/1/content", "<|bos|>", "must be 0, the token's id");
  expect("/added_tokens/2/content", "<|eos|>", "added_tokens[2]");
  expect("/added_tokens/1/special", "yes", "true or false");
  expect("/added_tokens/1/other", true, "other");
  expect("/added_tokens", Json::object(), "an array");
}

TEST_F(HostileTokenizer, RefusesPatternsItCannotMatchExactly) {
  const auto pattern = [&](const std::string& text, const std::string& part) {
    expect("/pre_tokenizer/pretokenizers/0/pattern/Regex", text, part);
  };
  for (const char* text :
       {R"(\h)", R"(\w)",   R"(\b)",  R"(\p{Han})", R"(\p{^L})",   R"(\x41)",   R"(\1)",
        "(?i)a", "(?<n>a)", "(?m:a)", "[a&&b]",     "[[:alpha:]]", "[]a]",      "a{,3}",
        "a{2}+", "a{2}?",   "{",      "(?i:ss)",    "(?i:[a])",    "[^\\P{L}]", "[\\d-z]"}) {
    pattern(text, "not supported");
  }
  pattern("", "is empty");
  pattern("(a", "( without )");
  pattern("a)", ") without (");
  pattern("[a", "[ without ]");
  pattern("[b-a]", "range");
  pattern("a\\", "backslash");
  pattern("*", "not supported");
  pattern("a*", "empty string");
  pattern("a|", "empty string");
  pattern(std::string(70000, 'a'), "bytes");
  pattern(std::string(10000, '(') + "a" + std::string(10000, ')'), "not supported");
}

TEST_F(HostileTokenizer, GivesUpOnCatastrophicPatterns) {
  Json changed = good_;
  changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+a+)+[bc]";
  const Tokenizer tokenizer = Tokenizer::parse(changed.dump(), "t.json");
  EXPECT_ERROR(tokenizer.encode(std::string(5000, 'a')), "failed at byte 0");
}

TEST_F(HostileTokenizer, SurvivesMutations) {
  // A small file, so that mutations hit all of it.
  Json small = good_;
  small["model"]["merges"] = Json::array({{"a", "b"}, {"ab", "c"}});
  Json vocabulary = Json::object();
  for (const auto& [token, id] : good_["model"]["vocab"].items()) {
    if (id.get<int>() <= 256) vocabulary[token] = id;
  }
  vocabulary["ab"] = 257;
  vocabulary["abc"] = 258;
  small["model"]["vocab"] = vocabulary;
  for (size_t i = 1; i < small["added_tokens"].size(); ++i)
    small["added_tokens"][i]["id"] = 258 + i;
  auto& ids = small["post_processor"]["processors"][1]["special_tokens"]["<|eos|>"]["ids"];
  ids[0] = 259;
  const std::string text = small.dump();
  EXPECT_EQ(Tokenizer::parse(text, "t.json").encode("abc abd", false).size(), 4u);
  survive_mutations(text, 4000, [](const std::string& json) {
    const Tokenizer tokenizer = Tokenizer::parse(json, "t.json");
    const auto ids = tokenizer.encode("abc <|eos|>x  <mask> word e\u0301 123\n");
    tokenizer.decode(ids);
  });
}

}  // namespace
}  // namespace twell::app
