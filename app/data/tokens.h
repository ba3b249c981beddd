#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "app/data/text.h"
#include "app/hf/tokenizer.h"

namespace twell::app {

// Documents as one stream of token ids, each document followed by the separator. Ids below 65,536
// take two bytes, others four.
class TokenStream {
 public:
  // `id_limit` is the largest id that will be appended, plus one (Tokenizer::id_limit()).
  explicit TokenStream(int64_t id_limit = 1);

  void append(const std::vector<int64_t>& ids);  // throws Error for ids outside [0, id_limit)
  void truncate(int64_t size);                   // keeps the first `size` ids, which must be there
  int64_t size() const { return wide_ ? int64_t(words_.size()) : int64_t(halves_.size()); }
  int64_t operator[](int64_t i) const { return wide_ ? int64_t{words_[i]} : int64_t{halves_[i]}; }

 private:
  int64_t id_limit_;
  bool wide_;
  std::vector<uint16_t> halves_;
  std::vector<uint32_t> words_;
};

// The ids of one document, as training, evaluation and inspection all see it: its text with the
// special tokens of the tokenizer's post-processor (a leading bos, say), ended by `separator` (the
// model's eos), if there is one and the post-processor has not put it there already.
std::vector<int64_t> encode_document(const Tokenizer& tokenizer, std::string_view text,
                                     std::optional<int64_t> separator);

// The documents of `paths`, each by encode_document, as one stream of ids below `id_limit` (Error
// for others). Documents that start after the first `wanted` ids are left out (0: none are).
TokenStream read_stream(const std::vector<std::filesystem::path>& paths, const Tokenizer& tokenizer,
                        std::optional<int64_t> separator, int64_t id_limit, int64_t wanted = 0);

// The corpus of a training run.
struct Corpus {
  TokenStream train;
  TokenStream heldout;
  int64_t train_documents = 0;
  int64_t heldout_documents = 0;
  uint64_t train_bytes = 0;  // of UTF-8 text, for bits per byte
  uint64_t heldout_bytes = 0;
  TextReport report;
};

// Reads `paths`, splits by is_heldout and tokenizes by encode_document. If `heldout_fraction` is
// above 0 but one of the parts gets no document (there are few), the last such fraction of all
// tokens is held out instead. `progress`, if set, is called now and then with the bytes read so
// far.
Corpus tokenize_corpus(const std::vector<std::filesystem::path>& paths, const Tokenizer& tokenizer,
                       int64_t separator, double heldout_fraction, const TextOptions& options = {},
                       const std::function<void(uint64_t bytes)>& progress = {});

// Draws batches of windows of `length` + 1 tokens (inputs are [:, :-1], targets [:, 1:]) from a
// stream. The step number is the only state: batch(step) depends on nothing but the stream and the
// arguments, so a resumed run sees the same batches. An epoch visits every window once, in a
// keyed-permutation order, with windows shifted by a fresh offset in each epoch.
class BatchSampler {
 public:
  // Throws Error if the stream holds fewer than `length` + 1 tokens. Keeps a reference to `stream`.
  BatchSampler(const TokenStream& stream, int64_t batch_size, int64_t length, uint64_t seed);

  torch::Tensor batch(int64_t step) const;      // [batch_size, length + 1] int64, CPU
  int64_t windows() const { return windows_; }  // per epoch
  double epoch(int64_t step) const;             // epochs completed before `step`

 private:
  int64_t start_of(uint64_t sample) const;

  const TokenStream& stream_;
  int64_t batch_size_;
  int64_t length_;
  uint64_t seed_;
  int64_t windows_;
};

}  // namespace twell::app
