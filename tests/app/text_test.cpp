#include "app/data/text.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <numeric>
#include <set>

#include "app/data/tokens.h"
#include "app/util/utf8.h"
#include "tests/app/fixtures.h"
#include "tests/app/mutate.h"

namespace twell::app {
namespace {

struct Read {
  TextReport report;
  std::vector<Document> documents;
};

Read read(const std::vector<std::filesystem::path>& paths, const TextOptions& options = {}) {
  Read result;
  result.report =
      read_documents(paths, options, [&](Document d) { result.documents.push_back(std::move(d)); });
  return result;
}

TEST(Utf8, FindsIllFormedBytes) {
  for (const char* text : {"", "a", "\u00e9", "\u20ac", "\U0001f600", "\uffff", "12345678\u00e9"}) {
    EXPECT_EQ(find_invalid_utf8(text), std::nullopt) << text;
  }
  for (const char* bad :
       {"\x80", "\xc0\x80", "\xc1\xbf", "\xc3", "\xc3(", "\xe0\x9f\xbf", "\xe2\x82", "\xed\xa0\x80",
        "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5", "\xff"}) {
    EXPECT_EQ(find_invalid_utf8(bad), 0u);
    EXPECT_EQ(find_invalid_utf8("12345678\u20ac" + std::string(bad)), 11u);
  }
  EXPECT_EQ(repair_utf8("a\xe2\x82z\xf0\x9f\x98"), "a\ufffdz\ufffd");
  EXPECT_EQ(repair_utf8("\xed\xa0\x80"), "\ufffd\ufffd\ufffd");
}

TEST(Text, ReadsFoldersInOrderAndCountsWhatItSkips) {
  const TemporaryFolder folder;
  put(folder / "b/2.txt", "two");
  put(folder / "b/10.txt", "ten");
  put(folder / "a.c", "int x;\n");
  put(folder / "c.jsonl",
      "{\"text\":\"one\"}\n\n{\"text\":\"\\u00e9\",\"x\":[1]}\r\n{\"text\":\"\"}");
  put(folder / "empty", "");
  put(folder / "binary", std::string("a\0b", 3));
  put(folder / "latin1", "caf\xe9");
  put(folder / ".hidden", "x");
  put(folder / ".git/config", "x");
  std::filesystem::create_symlink(folder / "a.c", folder / "link.c");
  std::filesystem::create_symlink(folder / "b", folder / "linked");
  std::filesystem::create_symlink(folder / "nowhere", folder / "dangling");
  mkfifo((folder / "pipe").c_str(), 0600);

  const Read result = read({folder.path()});
  std::vector<std::string> texts;
  for (const Document& d : result.documents) texts.push_back(d.text);
  EXPECT_EQ(texts,
            (std::vector<std::string>{"int x;\n", "ten", "two", "one", "\u00e9", "int x;\n"}));
  EXPECT_EQ(result.documents[4].source, (folder / "c.jsonl").string() + ":3");
  EXPECT_EQ(result.report.files, 5);
  EXPECT_EQ(result.report.documents, 6);
  EXPECT_EQ(result.report.bytes, 25u);
  EXPECT_EQ(result.report.skipped, (std::map<std::string, int64_t>{{"binary", 1},
                                                                   {"empty", 2},
                                                                   {"hidden", 2},
                                                                   {"links to folders", 1},
                                                                   {"not UTF-8", 1},
                                                                   {"not regular files", 2}}));
  EXPECT_NE(result.report.summary().find("1 not UTF-8"), std::string::npos);
}

TEST(Text, RefusesSingleFilesByName) {
  const TemporaryFolder folder;
  put(folder / "empty", "");
  put(folder / "binary", std::string("a\0b", 3));
  put(folder / "latin1", "caf\xe9");
  put(folder / "long", std::string(1000, 'x'));
  std::filesystem::create_directory(folder / "none");
  EXPECT_ERROR(read({folder / "empty"}), "empty");
  EXPECT_ERROR(read({folder / "binary"}), "binary");
  EXPECT_ERROR(read({folder / "latin1"}), "not UTF-8");
  EXPECT_ERROR(read({folder / "missing"}), "missing");
  EXPECT_ERROR(read({folder / "none"}), "no text found");
  EXPECT_ERROR(read({}), "no text given");
  EXPECT_ERROR(read({"/dev/zero"}), "regular file");
  EXPECT_ERROR(read({folder / "long"}, {.max_document_bytes = 999}), "over 999 bytes");
  EXPECT_ERROR(read({folder / "long", folder / "long"}, {.max_total_bytes = 1999}), "1999");
  EXPECT_EQ(read({folder / "long"}, {.max_document_bytes = 1000}).documents.size(), 1u);
}

TEST(Text, RefusesBadJsonLines) {
  const TemporaryFolder folder;
  const auto expect = [&](const std::string& lines, const std::string& part) {
    put(folder / "f.jsonl", lines);
    EXPECT_ERROR(read({folder / "f.jsonl"}), part);
  };
  expect("{\"text\":\"a\"}\n{\"text\":", "f.jsonl:2");
  expect("{\"text\":5}", "\"text\" is 5");
  expect("{\"content\":\"a\"}", "has no \"text\"");
  expect("[]", "an object");
  expect("{\"text\":\"\xff\"}", "f.jsonl:1");
  expect("{\"text\":\"\\ud800\"}", "f.jsonl:1");
  expect(std::string(1 << 20, '['), "deeper");
  expect("\n\n", "no text found");
  put(folder / "f.jsonl", "{\"text\":\"" + std::string(3 << 20, 'x') + "\"}");
  EXPECT_ERROR(read({folder / "f.jsonl"}, {.max_document_bytes = 1 << 20}), "f.jsonl:1");
  EXPECT_EQ(read({folder / "f.jsonl"}).report.bytes, uint64_t{3 << 20});
}

TEST(Text, ReadsLinesAcrossBuffers) {
  const TemporaryFolder folder;
  std::string lines;
  for (int i = 0; i < 5000; ++i) {
    lines += "{\"text\":\"" + std::string(static_cast<size_t>(i % 997), 'a') + std::to_string(i) +
             "\"}\n";
  }
  put(folder / "f.jsonl", lines);
  const Read result = read({folder / "f.jsonl"});
  ASSERT_EQ(result.documents.size(), 5000u);
  for (size_t i = 0; i < 5000; ++i) {
    EXPECT_EQ(result.documents[i].text, std::string(i % 997, 'a') + std::to_string(i));
    EXPECT_TRUE(result.documents[i].source.ends_with(":" + std::to_string(i + 1)));
  }
}

TEST(Text, SurvivesMutations) {
  const TemporaryFolder folder;
  survive_mutations("{\"text\":\"abc\"}\n{\"text\":\"d\\u00e9f\", \"n\": [1, {\"a\": null}]}\n",
                    2000, [&](const std::string& text) {
                      put(folder / "f.jsonl", text);
                      for (const Document& d : read({folder / "f.jsonl"}).documents) {
                        EXPECT_EQ(find_invalid_utf8(d.text), std::nullopt);
                      }
                    });
}

TEST(Heldout, IsAStableShareOfTheTexts) {
  int64_t heldout = 0;
  for (int i = 0; i < 20000; ++i) heldout += is_heldout("document " + std::to_string(i), 0.05);
  EXPECT_NEAR(static_cast<double>(heldout), 1000, 150);  // five standard deviations
  for (int i = 0; i < 1000; ++i) {
    const std::string text = std::to_string(i);
    EXPECT_FALSE(is_heldout(text, 0));
    EXPECT_LE(is_heldout(text, 0.1), is_heldout(text, 0.5));  // a larger part holds the smaller one
  }
  // The split must not change between versions: this was computed once, by a script of its own.
  constexpr double kHelloHash = 0.9131681176347193;
  EXPECT_EQ(is_heldout("hello", kHelloHash + 1e-9), true);
  EXPECT_EQ(is_heldout("hello", kHelloHash - 1e-9), false);
}

class CorpusTest : public testing::Test {
 protected:
  const Tokenizer tokenizer_ = Tokenizer::load(fixtures() / "tokenizers/gpt2");
  const int64_t eos_ = *tokenizer_.token_to_id("<|eos|>");
  const TemporaryFolder folder_;
};

TEST_F(CorpusTest, SplitsAndSeparatesDocuments) {
  for (int i = 0; i < 200; ++i) {
    put(folder_ / std::to_string(i), "document number " + std::to_string(i));
  }
  uint64_t last = 0;
  const Corpus corpus = tokenize_corpus({folder_.path()}, tokenizer_, eos_, 0.3, {},
                                        [&](uint64_t bytes) { last = bytes; });
  EXPECT_GT(last, 0u);
  EXPECT_EQ(corpus.train_documents + corpus.heldout_documents, 200);
  EXPECT_EQ(corpus.train_bytes + corpus.heldout_bytes, corpus.report.bytes);
  EXPECT_NEAR(static_cast<double>(corpus.heldout_documents), 60, 33);
  std::multiset<std::string> texts;
  for (const TokenStream* stream : {&corpus.train, &corpus.heldout}) {
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < stream->size(); ++i) {
      if ((*stream)[i] != eos_) {
        ids.push_back((*stream)[i]);
        continue;
      }
      texts.insert(tokenizer_.decode(ids));
      EXPECT_EQ(is_heldout(tokenizer_.decode(ids), 0.3), stream == &corpus.heldout);
      ids.clear();
    }
    EXPECT_TRUE(ids.empty());
  }
  EXPECT_EQ(texts.size(), 200u);
  EXPECT_EQ(texts.count("document number 7"), 1u);
}

TEST_F(CorpusTest, HoldsOutATailOfASingleDocument) {
  put(folder_ / "one.txt", std::string(1000, 'a') + std::string(1000, '!'));
  const Corpus whole = tokenize_corpus({folder_ / "one.txt"}, tokenizer_, eos_, 0);
  const Corpus split = tokenize_corpus({folder_ / "one.txt"}, tokenizer_, eos_, 0.25);
  EXPECT_EQ(whole.heldout.size(), 0);
  EXPECT_EQ(split.heldout.size(), (whole.train.size() + 3) / 4);
  EXPECT_EQ(split.train.size() + split.heldout.size(), whole.train.size());
  EXPECT_EQ(split.train_bytes + split.heldout_bytes, 2000u);
  for (int64_t i = 0; i < whole.train.size(); ++i) {
    const int64_t cut = split.train.size();
    EXPECT_EQ(whole.train[i], i < cut ? split.train[i] : split.heldout[i - cut]);
  }
  EXPECT_ERROR(tokenize_corpus({folder_ / "one.txt"}, tokenizer_, eos_, 1), "below 1");
  EXPECT_ERROR(tokenize_corpus({folder_ / "one.txt"}, tokenizer_, 999999, 0), "999999");
}

TEST_F(CorpusTest, KeepsTheTokenizersOwnEos) {
  put(folder_ / "one.txt", "text");
  const Tokenizer llama = Tokenizer::load(fixtures() / "tokenizers/llama3");  // <|bos|> A <|eos|>
  const int64_t eos = *llama.token_to_id("<|eos|>");
  const Corpus corpus = tokenize_corpus({folder_ / "one.txt"}, llama, eos, 0);
  const auto ids = llama.encode("text");
  ASSERT_EQ(corpus.train.size(), static_cast<int64_t>(ids.size()));
  EXPECT_EQ(corpus.train[0], *llama.token_to_id("<|bos|>"));
  EXPECT_EQ(corpus.train[corpus.train.size() - 1], eos);
}

// Documents are tokenized some 16 MB at a time, by all threads; their order stays.
TEST_F(CorpusTest, TokenizesMuchTextInOrder) {
  for (int i = 0; i < 9; ++i) {
    std::string text = std::to_string(i) + "\n";
    while (text.size() < (i % 3 == 0 ? 5u : 1u) << 20) text += "return value;\n";
    put(folder_ / std::to_string(i), text);
  }
  const int threads = at::get_num_threads();
  const TokenStream want = read_stream({folder_.path()}, tokenizer_, eos_, tokenizer_.id_limit());
  for (const int count : {1, 3}) {
    at::set_num_threads(count);
    const Corpus corpus = tokenize_corpus({folder_.path()}, tokenizer_, eos_, 0);
    EXPECT_EQ(corpus.train_documents, 9);
    ASSERT_EQ(corpus.train.size(), want.size());
    bool same = true;
    for (int64_t i = 0; i < want.size(); ++i) same = same && corpus.train[i] == want[i];
    EXPECT_TRUE(same) << count;
  }
  at::set_num_threads(threads);
}

TEST_F(CorpusTest, ReadsTheSameTokensWithoutASplit) {
  for (int i = 0; i < 20; ++i) put(folder_ / std::to_string(i), std::string(i, 'x') + " y");
  for (const char* name : {"gpt2", "llama3"}) {  // without and with a template
    const Tokenizer tokenizer = Tokenizer::load(fixtures() / "tokenizers" / name);
    const int64_t eos = *tokenizer.token_to_id("<|eos|>");
    const TokenStream all = tokenize_corpus({folder_.path()}, tokenizer, eos, 0).train;
    const TokenStream stream = read_stream({folder_.path()}, tokenizer, eos, tokenizer.id_limit());
    ASSERT_EQ(stream.size(), all.size());
    for (int64_t i = 0; i < all.size(); ++i) ASSERT_EQ(stream[i], all[i]) << name << " " << i;

    // `wanted` keeps whole documents, and at least so many ids.
    for (const int64_t wanted : {int64_t{1}, all.size() / 2, all.size(), 2 * all.size()}) {
      const TokenStream part =
          read_stream({folder_.path()}, tokenizer, eos, tokenizer.id_limit(), wanted);
      EXPECT_GE(part.size(), std::min(wanted, all.size()));
      EXPECT_EQ(part[part.size() - 1], eos);
      if (wanted == 1) {
        EXPECT_LT(part.size(), all.size() / 2);
      }
    }
    EXPECT_ERROR(read_stream({folder_.path()}, tokenizer, eos, 1), "outside [0, 1)");
  }
  const auto ids = tokenizer_.encode("text");
  EXPECT_EQ(encode_document(tokenizer_, "text", std::nullopt), ids);  // a model without eos
  EXPECT_EQ(encode_document(tokenizer_, "", eos_), std::vector<int64_t>{eos_});
}

TEST(TokenStream, StoresNarrowAndWideIds) {
  for (const int64_t limit : {int64_t{1}, int64_t{65536}, int64_t{65537}, int64_t{1} << 32}) {
    TokenStream stream(limit);
    stream.append({0, limit - 1});
    EXPECT_EQ(stream.size(), 2);
    EXPECT_EQ(stream[1], limit - 1);
    EXPECT_ERROR(stream.append({limit}), "outside");
    EXPECT_ERROR(stream.append({-1}), "-1");
    stream.truncate(1);
    EXPECT_EQ(stream.size(), 1);
  }
  EXPECT_ERROR(TokenStream(0), "0");
  EXPECT_ERROR(TokenStream((int64_t{1} << 32) + 1), "2^32");
}

TokenStream counting(int64_t size) {
  TokenStream stream(size);
  std::vector<int64_t> ids(static_cast<size_t>(size));
  std::iota(ids.begin(), ids.end(), 0);
  stream.append(ids);
  return stream;
}

TEST(BatchSampler, VisitsEveryWindowOncePerEpoch) {
  for (const auto& [size, length] :
       {std::pair<int64_t, int64_t>{1000, 7}, {8, 7}, {70000, 16}, {2, 1}}) {
    const TokenStream stream = counting(size);
    const BatchSampler sampler(stream, 1, length, 5);
    EXPECT_EQ(sampler.windows(), size / length);
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      std::set<int64_t> starts;
      for (int64_t i = 0; i < sampler.windows(); ++i) {
        const torch::Tensor batch = sampler.batch(epoch * sampler.windows() + i);
        EXPECT_EQ(batch.sizes(), (std::vector<int64_t>{1, length + 1}));
        const int64_t start = batch[0][0].item<int64_t>();
        starts.insert(start);
        const torch::Tensor expected =
            torch::arange(start, start + length + 1, torch::kInt64).remainder(size);
        ASSERT_TRUE(torch::equal(batch[0], expected));
      }
      EXPECT_EQ(starts.size(), static_cast<size_t>(sampler.windows()));
      for (auto next = starts.begin(); std::next(next) != starts.end(); ++next) {
        const int64_t gap = *std::next(next) - *next;
        EXPECT_TRUE(gap % length == 0 || gap % length == size % length) << gap;
      }
    }
  }
}

TEST(BatchSampler, DependsOnStepAndSeedAlone) {
  const TokenStream stream = counting(5000);
  const BatchSampler first(stream, 4, 16, 1);
  const BatchSampler second(stream, 4, 16, 1);
  const BatchSampler other(stream, 4, 16, 2);
  first.batch(0);
  EXPECT_TRUE(torch::equal(first.batch(123), second.batch(123)));
  EXPECT_FALSE(torch::equal(first.batch(123), first.batch(124)));
  EXPECT_FALSE(torch::equal(first.batch(123), other.batch(123)));
  EXPECT_FALSE(torch::equal(first.batch(0), first.batch(78)));  // the next epoch: another order
  EXPECT_DOUBLE_EQ(first.epoch(78), 1.0);
}

TEST(BatchSampler, RefusesTooLittleText) {
  const TokenStream stream = counting(10);
  EXPECT_ERROR(BatchSampler(stream, 1, 10, 0), "only 10 tokens");
  EXPECT_ERROR(BatchSampler(stream, 0, 5, 0), "at least 1");
  EXPECT_ERROR(BatchSampler(stream, 1, 0, 0), "at least 1");
  EXPECT_NO_THROW(BatchSampler(stream, 1, 9, 0));
}

}  // namespace
}  // namespace twell::app
