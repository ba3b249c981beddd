#include "app/data/tokens.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <string>
#include <utility>

#include "app/error.h"

namespace twell::app {
namespace {

constexpr uint64_t kBatchBytes = 16 << 20;  // of text that is tokenized at a time

// The finalizer of SplitMix64: a bijection that mixes all bits.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// The image of `index` under a permutation of [0, count) that `key` chooses: a Feistel network on
// the next even number of bits, walked until it falls into the range.
uint64_t permute(uint64_t index, uint64_t count, uint64_t key) {
  constexpr int kRounds = 6;
  int half = 1;
  while (half < 32 && (uint64_t{1} << (2 * half)) < count) ++half;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  do {
    uint64_t left = index >> half;
    uint64_t right = index & mask;
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (mix(right ^ mix(key + static_cast<uint64_t>(round))) & mask);
      left = right;
      right = next;
    }
    index = left << half | right;
  } while (index >= count);
  return index;
}

// Appends the tail of `from`, a `fraction` of its tokens but at least one, to `to`.
TokenStream take_tail(TokenStream& from, double fraction, int64_t id_limit) {
  const auto count = static_cast<int64_t>(std::ceil(static_cast<double>(from.size()) * fraction));
  TokenStream tail(id_limit);
  std::vector<int64_t> ids;
  for (int64_t i = from.size() - count; i < from.size(); ++i) ids.push_back(from[i]);
  tail.append(ids);
  from.truncate(from.size() - count);
  return tail;
}

// The ids of each of `texts`, by all threads; each takes the next text when it is done with one.
std::vector<std::vector<int64_t>> encode_documents(const Tokenizer& tokenizer,
                                                   const std::vector<std::string>& texts,
                                                   int64_t separator) {
  std::vector<std::vector<int64_t>> ids(texts.size());
  std::atomic<size_t> next = 0;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < texts.size(); i = next++) {
      ids[i] = encode_document(tokenizer, texts[i], separator);
    }
  });
  return ids;
}

}  // namespace

TokenStream::TokenStream(int64_t id_limit) : id_limit_(id_limit), wide_(id_limit > 65536) {
  if (id_limit < 1 || id_limit > int64_t{UINT32_MAX} + 1) {
    throw Error("a token stream for ids below " + std::to_string(id_limit) +
                " is not possible: the limit must be from 1 to 2^32");
  }
}

void TokenStream::append(const std::vector<int64_t>& ids) {
  for (const int64_t id : ids) {
    if (id < 0 || id >= id_limit_) {
      throw Error("token id " + std::to_string(id) + " is outside [0, " +
                  std::to_string(id_limit_) + ")");
    }
    if (wide_) {
      words_.push_back(static_cast<uint32_t>(id));
    } else {
      halves_.push_back(static_cast<uint16_t>(id));
    }
  }
}

void TokenStream::truncate(int64_t size) {
  words_.resize(wide_ ? static_cast<size_t>(size) : 0);
  halves_.resize(wide_ ? 0 : static_cast<size_t>(size));
}

std::vector<int64_t> encode_document(const Tokenizer& tokenizer, std::string_view text,
                                     std::optional<int64_t> separator) {
  std::vector<int64_t> ids = tokenizer.encode(text);
  if (separator && (ids.empty() || ids.back() != *separator)) ids.push_back(*separator);
  return ids;
}

TokenStream read_stream(const std::vector<std::filesystem::path>& paths, const Tokenizer& tokenizer,
                        std::optional<int64_t> separator, int64_t id_limit, int64_t wanted) {
  TokenStream stream(id_limit);
  read_documents(paths, {}, [&](const Document& document) {
    if (wanted > 0 && stream.size() >= wanted) return;
    stream.append(encode_document(tokenizer, document.text, separator));
  });
  return stream;
}

Corpus tokenize_corpus(const std::vector<std::filesystem::path>& paths, const Tokenizer& tokenizer,
                       int64_t separator, double heldout_fraction, const TextOptions& options,
                       const std::function<void(uint64_t bytes)>& progress) {
  if (!(heldout_fraction >= 0 && heldout_fraction < 1)) {
    throw Error("held-out fraction " + std::to_string(heldout_fraction) +
                " must be at least 0 and below 1");
  }
  const int64_t id_limit = tokenizer.id_limit();
  Corpus corpus{.train = TokenStream(id_limit), .heldout = TokenStream(id_limit), .report = {}};
  std::vector<std::string> batch;
  uint64_t bytes = 0, bytes_before = 0;
  const auto flush = [&] {
    const auto ids = encode_documents(tokenizer, batch, separator);
    for (size_t i = 0; i < batch.size(); ++i) {
      const bool heldout = is_heldout(batch[i], heldout_fraction);
      (heldout ? corpus.heldout : corpus.train).append(ids[i]);
      (heldout ? corpus.heldout_documents : corpus.train_documents) += 1;
      (heldout ? corpus.heldout_bytes : corpus.train_bytes) += batch[i].size();
    }
    batch.clear();
    bytes_before = bytes;
    if (progress) progress(bytes);
  };
  corpus.report = read_documents(paths, options, [&](Document document) {
    bytes += document.text.size();
    batch.push_back(std::move(document.text));
    if (bytes - bytes_before >= kBatchBytes) flush();
  });
  flush();
  const bool one_sided = corpus.train_documents == 0 || corpus.heldout_documents == 0;
  if (heldout_fraction > 0 && one_sided) {
    if (corpus.train_documents == 0) {
      std::swap(corpus.train, corpus.heldout);
      std::swap(corpus.train_documents, corpus.heldout_documents);
      std::swap(corpus.train_bytes, corpus.heldout_bytes);
    }
    corpus.heldout = take_tail(corpus.train, heldout_fraction, id_limit);
    corpus.heldout_documents = 1;
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < corpus.heldout.size(); ++i) ids.push_back(corpus.heldout[i]);
    corpus.heldout_bytes = std::min<uint64_t>(tokenizer.decode(ids).size(), corpus.train_bytes);
    corpus.train_bytes -= corpus.heldout_bytes;
  }
  return corpus;
}

BatchSampler::BatchSampler(const TokenStream& stream, int64_t batch_size, int64_t length,
                           uint64_t seed)
    : stream_(stream), batch_size_(batch_size), length_(length), seed_(seed) {
  if (batch_size < 1 || length < 1) {
    throw Error("batches of " + std::to_string(batch_size) + " windows of " +
                std::to_string(length) + " tokens are not possible: both must be at least 1");
  }
  if (stream.size() <= length) {
    throw Error("the text has only " + std::to_string(stream.size()) + " tokens, but one window " +
                "needs " + std::to_string(length + 1) + "; give more text or shorter windows");
  }
  windows_ = stream.size() / length;
}

int64_t BatchSampler::start_of(uint64_t sample) const {
  const auto windows = static_cast<uint64_t>(windows_);
  const uint64_t epoch = sample / windows;
  const uint64_t key = mix(mix(seed_) ^ epoch);
  const uint64_t window = permute(sample % windows, windows, key);
  const uint64_t shift = mix(key) % static_cast<uint64_t>(length_);
  return static_cast<int64_t>(window) * length_ + static_cast<int64_t>(shift);
}

torch::Tensor BatchSampler::batch(int64_t step) const {
  torch::Tensor tokens = torch::empty({batch_size_, length_ + 1}, torch::kInt64);
  int64_t* out = tokens.data_ptr<int64_t>();
  for (int64_t row = 0; row < batch_size_; ++row) {
    const int64_t start = start_of(static_cast<uint64_t>(step * batch_size_ + row));
    // The stream is read as a circle: a shifted last window goes on at the start.
    for (int64_t i = 0; i <= length_; ++i) *out++ = stream_[(start + i) % stream_.size()];
  }
  return tokens;
}

double BatchSampler::epoch(int64_t step) const {
  return static_cast<double>(step) * static_cast<double>(batch_size_) /
         static_cast<double>(windows_);
}

}  // namespace twell::app
